"""The Future-KL over sequences that are split across context-parallel ranks, with one small collective.

Each rank sums inside its own chunks of every sequence and summarises a chunk by three numbers: the sum at its head, the
product of its tokens' decays, and its number of dual-clipped tokens, which the sequence drop needs. One all-gather
shows all summaries to all ranks. Folding those of the later chunks gives what follows a chunk, and a second local scan
starts from there. An empty chunk has the summary (0, 1, 0), which changes no fold, so that chunks may have any length.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.future_kl.scan import (
    check_half_life,
    result_dtype,
    segment_heads,
    segmented_reverse_scan,
    segmented_reverse_sum,
)
from megatron_fipo.algorithms.future_kl.segments import SegmentPlan, segment_plan
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.parallel.packs import check_group


def future_kl(
    log_ratio: Tensor,
    decay_half_life_tokens: float,
    layout: PackLayout,
    group: dist.ProcessGroup | None,
    clipped: Tensor | None = None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Future-KL of this rank's tokens, summed over the whole of every sequence (eq. 6, arXiv:2603.19835).

    With context parallelism the ranks of `group` run one all-gather, of 24 bytes a rank for each of its chunks of N
    sequences (48·N bytes for zigzag); without it there is no communication. Nothing waits for the device, and no
    gradient flows.

    Args:
        log_ratio: [t], zero on tokens that take no part; they still count as distance.
        decay_half_life_tokens: τ > 0, with γ = 2^(−1/τ); may be infinite.
        layout: Where the tokens lie; t = layout.num_local_tokens, N = layout.num_sequences.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.
        clipped: [t] bool, tokens to count in each sequence; None counts nothing.
        decay: [t] floating, γ_t in [0, 1] for every token instead of γ: F_t = Δ_t + γ_t·F_{t+1}.

    Returns:
        Future-KL [t] (float64 for float64, else float32), and for every sequence of the pack the number of `clipped`
        tokens on all ranks, [N] int64.

    Raises:
        ValueError: The half-life is not positive, a shape does not fit the layout, or `group` does not have
            `layout.cp_size` ranks.
    """
    check_half_life(decay_half_life_tokens)
    check_group(layout, group)
    for name, value in (("log_ratio", log_ratio), ("clipped", clipped), ("decay", decay)):
        if value is not None and value.shape != (layout.num_local_tokens,):
            raise ValueError(
                f"{name}.shape = {tuple(value.shape)}: the layout holds {layout.num_local_tokens} tokens on this rank"
            )
    if layout.cp_size == 1:
        sums = sums_from(None, log_ratio, decay_half_life_tokens, layout, decay)
        return sums, _count_by_segment(clipped, _plan(layout, log_ratio.device))
    mine = chunk_summaries(log_ratio, decay_half_life_tokens, layout, clipped, decay)
    gathered = mine.new_empty(layout.cp_size, *mine.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), mine, group=group)
    chunks = in_order_of_position(gathered, layout)
    sums = sums_from(fold(chunks, layout), log_ratio, decay_half_life_tokens, layout, decay)
    return sums, chunks[..., 2].sum(dim=1).long()


def chunk_summaries(
    log_ratio: Tensor, half_life: float, layout: PackLayout, clipped: Tensor | None = None, decay: Tensor | None = None
) -> Tensor:
    """What the other ranks need to know of this rank's chunks, c of every sequence.

    Args:
        log_ratio: [t].
        half_life: In tokens; not read where there is a `decay`.
        layout: Where the tokens lie.
        clipped: [t] bool.
        decay: [t].

    Returns:
        [N, c, 3] float64: decayed sum at the head (0 for an empty chunk), decay over the chunk (1), `clipped` tokens.
    """
    values, plan = log_ratio.detach(), _plan(layout, log_ratio.device)
    if decay is None:
        heads = segment_heads(values, half_life, plan)
        decays = torch.exp2(-plan.segment_lengths.double() / half_life)
    else:
        sums, products = segmented_reverse_scan(values, decay.detach(), plan)
        first_tokens = plan.bounds[plan.occupied]
        heads = sums.new_zeros(len(plan.lengths)).index_copy_(0, plan.occupied, sums[first_tokens])
        decays = sums.new_ones(len(plan.lengths)).index_copy_(0, plan.occupied, products[first_tokens])
    counts = _count_by_segment(clipped, plan)
    shape = (layout.num_sequences, len(layout.local_chunk_numbers), 3)
    return torch.stack([heads, decays, counts.double()], dim=-1).view(shape)


def in_order_of_position(gathered: Tensor, layout: PackLayout) -> Tensor:
    """Summaries of the K chunks of every sequence from those of ranks 0 … C−1: [C, N, c, 3] to [N, K, 3]."""
    chunks: dict[int, Tensor] = {}
    for rank in range(layout.cp_size):
        for place, number in enumerate(layout.on_rank(rank).local_chunk_numbers):
            chunks[number] = gathered[rank, :, place]
    # Stacked slices: an index list would be copied to the device, and the host would wait for it.
    return torch.stack([chunks[number] for number in range(layout.chunks_per_sequence)], dim=1)


def fold(chunks: Tensor, layout: PackLayout) -> Tensor:
    """Future-KL of the token that follows each of this rank's chunks, zero behind the last one.

    Args:
        chunks: [N, K, 3] float64, summaries of all chunks of every sequence in order of position.
        layout: Says which c chunks are this rank's.

    Returns:
        [N, c] float64.
    """
    heads, decays = chunks[..., 0], chunks[..., 1]
    following = []
    for number in layout.local_chunk_numbers:
        later = slice(number + 1, None)
        # The next chunk counts in full, each one behind it is decayed over all between.
        weights = torch.nn.functional.pad(decays[:, later], (1, 0), value=1.0).cumprod(dim=1)[:, :-1]
        following.append((weights * heads[:, later]).sum(dim=1))
    return torch.stack(following, dim=1)


def sums_from(
    following: Tensor | None, log_ratio: Tensor, half_life: float, layout: PackLayout, decay: Tensor | None = None
) -> Tensor:
    """Future-KL of this rank's tokens, given that of the token behind each of its chunks.

    Args:
        following: [N, c] float64, as `fold` gives it; None where nothing follows.
        log_ratio: [t].
        half_life: In tokens; not read where there is a `decay`.
        layout: Where the tokens lie.
        decay: [t].

    Returns:
        [t], float64 for float64, else float32.
    """
    values, plan, dtype = log_ratio.detach(), _plan(layout, log_ratio.device), result_dtype(log_ratio)
    following = None if following is None else following.reshape(-1)
    if decay is None:
        return segmented_reverse_sum(values, half_life, plan, following, dtype)
    sums, products = segmented_reverse_scan(values, decay.detach(), plan)
    if following is not None:
        sums = sums + products * following[plan.segment_ids]
    return sums.to(dtype)


def _plan(layout: PackLayout, device: torch.device) -> SegmentPlan:
    return segment_plan(layout.local_chunk_lengths, device)


def _count_by_segment(clipped: Tensor | None, plan: SegmentPlan) -> Tensor:
    """Marked tokens of every segment: [S] int64."""
    if clipped is None:
        return torch.zeros_like(plan.segment_lengths)
    running = torch.nn.functional.pad(clipped.cumsum(dim=0, dtype=torch.int32), (1, 0))
    return running[plan.bounds].diff().long()
