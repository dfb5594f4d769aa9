"""The Future-KL over sequences that are split across context-parallel ranks, with one small collective.

Each rank holds two chunks of every sequence. It sums inside its own chunks, then all ranks exchange the sum
at the head of each chunk (with the number of dual-clipped tokens, which the sequence drop needs), and every
rank adds the decayed heads of the later chunks to its own tokens. The chunks of one sequence are equally
long, so that their decay follows from the layout and need not travel.
"""

from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.future_kl.scan import (
    SegmentPlan,
    check_half_life,
    result_dtype,
    segment_plan,
    segmented_reverse_sum,
)
from megatron_fipo.parallel.layout import PackLayout


def future_kl(
    log_ratio: Tensor,
    decay_half_life_tokens: float,
    layout: PackLayout,
    group: dist.ProcessGroup | None,
    clipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Future-KL of this rank's tokens, summed over the whole of every sequence (eq. 6, arXiv:2603.19835).

    With context parallelism the ranks of `group` run one all-gather of 32·N bytes a rank (two float64 for
    each of the rank's two chunks of N sequences); without it there is no communication. No gradient flows.

    Args:
        log_ratio: [T / C], zero on tokens that take no part; they still count as distance.
        decay_half_life_tokens: τ > 0, with γ = 2^(−1/τ); may be infinite.
        layout: Where the tokens lie.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.
        clipped: [T / C] bool, tokens to count in each sequence; None counts nothing.

    Returns:
        Future-KL [T / C] (float64 for float64, else float32), and for every sequence of the pack the number
        of `clipped` tokens on all ranks, [N] int64.

    Raises:
        ValueError: The half-life is not positive, or `group` does not have `layout.cp_size` ranks.
    """
    check_half_life(decay_half_life_tokens)
    _check_group(layout, group)
    plan = segment_plan(layout.local_chunk_lengths, log_ratio.device)
    sums = segmented_reverse_sum(log_ratio.detach(), decay_half_life_tokens, plan)
    counts = _count_by_segment(clipped, plan)
    if layout.cp_size == 1:
        return sums.to(result_dtype(log_ratio)), counts.long()
    heads = sums[plan.segment_starts]
    local = torch.stack([heads, counts], dim=-1).reshape(layout.num_sequences, 2, 2)
    chunks = _gather_chunks(local, layout, group)
    carry = _carries(chunks[..., 0], decay_half_life_tokens, layout).reshape(-1)
    decay = torch.exp2(-plan.distances_to_end().double() / decay_half_life_tokens)
    sums = sums + decay * carry[plan.segment_ids]
    return sums.to(result_dtype(log_ratio)), chunks[..., 1].sum(dim=1).long()


def _check_group(layout: PackLayout, group: dist.ProcessGroup | None) -> None:
    size = 1 if group is None else dist.get_world_size(group)
    if layout.cp_size > 1 and size != layout.cp_size:
        raise ValueError(
            f"group = {'None' if group is None else f'{size} ranks'}: the layout has "
            f"cp_size = {layout.cp_size}; pass the context-parallel group"
        )


def _count_by_segment(clipped: Tensor | None, plan: SegmentPlan) -> Tensor:
    counts = torch.zeros(plan.segment_lengths.shape[0], dtype=torch.float64, device=plan.segment_ids.device)
    return counts if clipped is None else counts.index_add_(0, plan.segment_ids, clipped.double())


def _gather_chunks(local: Tensor, layout: PackLayout, group: dist.ProcessGroup | None) -> Tensor:
    """Values of all chunks in order of position: [N, 2 chunks of this rank, V] to [N, 2·C, V]."""
    gathered = local.new_empty(layout.cp_size, *local.shape)
    dist.all_gather_into_tensor(gathered.view(-1, *local.shape[1:]), local.contiguous(), group=group)
    return torch.cat([gathered[:, :, 0], gathered[:, :, 1].flip(0)]).transpose(0, 1)


def _carries(heads: Tensor, half_life: float, layout: PackLayout) -> Tensor:
    """What follows each of this rank's chunks, as its next token sees it: [N, 2·C] heads to [N, 2]."""
    weights = _carry_weights(layout.padded_lengths, layout.cp_size, half_life, heads.device)
    # Stacked slices: an index list would be copied to the device, and the host would wait for it.
    mine = torch.stack([weights[:, number] for number in layout.local_chunk_numbers], dim=1)
    return (mine * heads[:, None, :]).sum(dim=-1)


@lru_cache(maxsize=64)
def _carry_weights(padded_lengths: tuple[int, ...], cp_size: int, half_life: float, device: torch.device) -> Tensor:
    """Decay from the token behind chunk m to later heads: [N, 2·C (m), 2·C], zero at and before m."""
    numbers = torch.arange(2 * cp_size, dtype=torch.float64)
    between = numbers[None, :] - numbers[:, None] - 1
    lengths = torch.tensor(padded_lengths, dtype=torch.float64) / (2 * cp_size)
    decay = torch.exp2(-between.clamp(min=0) * lengths[:, None, None] / half_life)
    weights = torch.where(between >= 0, decay, 0.0)
    return weights.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else weights.to(device)
