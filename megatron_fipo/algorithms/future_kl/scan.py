"""The Future-KL in linear time: a decayed sum from the right inside every segment of a packed tensor.

Every segment is cut into blocks of 64 tokens. One product with a 64 × 64 triangle of decay powers sums inside
all blocks at once; the sums at the block heads are then summed over the blocks of their segment in the same
way, with the half-life counted in blocks; what that gives for the next block, decayed, is added to every
token of a block. The cost is O(64·T), without a loop over tokens. All sums are float64, so that neither the
packing nor TF32 shows in the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentPlan:
    """Where the blocks of a packed tensor lie, for S segments and M blocks; a function of the lengths alone.

    Attributes:
        num_values: T, tokens of all segments.
        segment_ids: [T] int64, every token's segment.
        segment_starts: [S] int64.
        segment_lengths: [S] int64.
        gather_indices: [M, 64] int64, tokens of every block; arbitrary where `occupied` is false.
        occupied: [M, 64] bool, false behind the end of a segment's last block.
        slots: [T] int64, every token's place in the flattened blocks.
        has_next_block: [M] bool, whether the block after this one belongs to the same segment.
        blocks: Plan of the block heads, or None where no segment has two blocks.
    """

    num_values: int
    segment_ids: Tensor
    segment_starts: Tensor
    segment_lengths: Tensor
    gather_indices: Tensor
    occupied: Tensor
    slots: Tensor
    has_next_block: Tensor
    blocks: "SegmentPlan | None"

    def distances_to_end(self) -> Tensor:
        """Every token's distance to the first token behind its segment: [T] int64, at least 1."""
        ends = self.segment_starts + self.segment_lengths
        positions = torch.arange(self.num_values, device=ends.device)
        return ends[self.segment_ids] - positions


def future_kl(
    log_ratio: Tensor, decay_half_life_tokens: float, cu_seqlens: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Future-KL of every token, F_t = Δ_t + γ·F_{t+1} inside its sequence (eq. 6, arXiv:2603.19835).

    Tokens that take no part (prompt, padding, filtered) must be zero; they still count as distance. No
    gradient flows.

    Args:
        log_ratio: [T] sequences end to end, or [B, T] one sequence a row, on any device.
        decay_half_life_tokens: τ > 0, with γ = 2^(−1/τ); may be infinite.
        cu_seqlens: Starts of the sequences of a [T] input, and its end T; None for a single one. On the host
            (a CPU tensor or integers), no call waits for the device; a tensor on the device is copied to the
            host first.

    Returns:
        The shape of `log_ratio`; float64 for float64, else float32.

    Raises:
        ValueError: The half-life is not positive, or `cu_seqlens` does not fit the input.
    """
    check_half_life(decay_half_life_tokens)
    plan = segment_plan(_segment_lengths(log_ratio, cu_seqlens), log_ratio.device)
    result = segmented_reverse_sum(log_ratio.detach().reshape(-1), decay_half_life_tokens, plan)
    return result.to(result_dtype(log_ratio)).reshape(log_ratio.shape)


def segmented_reverse_sum(values: Tensor, half_life: float, plan: SegmentPlan) -> Tensor:
    """Sum from the right with decay inside every segment: y_t = x_t + 2^(−1/half_life) · y_{t+1}.

    Args:
        values: [T], any floating dtype.
        half_life: In tokens; may be infinite.
        plan: Where the segments lie.

    Returns:
        [T] float64.
    """
    if plan.num_values == 0:
        return values.double()
    blocks = torch.where(plan.occupied, values.double()[plan.gather_indices], 0.0)
    sums = blocks @ _decay_triangle(half_life, values.device)
    if plan.blocks is not None:
        heads = segmented_reverse_sum(sums[:, 0], half_life / BLOCK, plan.blocks)
        carry = torch.where(plan.has_next_block, heads.roll(-1), 0.0)
        sums = sums + carry[:, None] * _decay_to_block_end(half_life, values.device)
    return sums.reshape(-1)[plan.slots]


@lru_cache(maxsize=16)
def segment_plan(lengths: tuple[int, ...], device: torch.device) -> SegmentPlan:
    """Plan of segments of these lengths (zero allowed) laid end to end; the last few are remembered."""
    num_values = sum(lengths)
    starts = _starts(lengths)
    blocks_per_segment = tuple(-(-length // BLOCK) for length in lengths)
    num_blocks = sum(blocks_per_segment)
    segment_starts = _to_device(starts, device)
    segment_lengths = _to_device(lengths, device)
    first_blocks = _to_device(_starts(blocks_per_segment), device)

    segments = torch.arange(len(lengths), device=device)
    segment_ids = segments.repeat_interleave(segment_lengths, output_size=num_values)
    positions = torch.arange(num_values, device=device) - segment_starts[segment_ids]
    block_segments = segments.repeat_interleave(_to_device(blocks_per_segment, device), output_size=num_blocks)
    block_numbers = torch.arange(num_blocks, device=device) - first_blocks[block_segments]
    offsets = block_numbers[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    ends = segment_lengths[block_segments]
    indices = segment_starts[block_segments][:, None] + offsets
    return SegmentPlan(
        num_values=num_values,
        segment_ids=segment_ids,
        segment_starts=segment_starts,
        segment_lengths=segment_lengths,
        gather_indices=indices.clamp(max=max(num_values - 1, 0)),
        occupied=offsets < ends[:, None],
        slots=first_blocks[segment_ids] * BLOCK + positions,
        has_next_block=(block_numbers + 1) * BLOCK < ends,
        blocks=segment_plan(blocks_per_segment, device) if max(blocks_per_segment, default=0) > 1 else None,
    )


def check_half_life(decay_half_life_tokens: float) -> None:
    """Refuse a half-life that is not positive."""
    if not decay_half_life_tokens > 0:
        raise ValueError(
            f"decay_half_life_tokens = {decay_half_life_tokens}: must be positive; use 32, or infinity for no decay"
        )


def result_dtype(log_ratio: Tensor) -> torch.dtype:
    """Dtype a Future-KL is returned in: that of the input, but float32 at least."""
    return torch.promote_types(log_ratio.dtype, torch.float32)


def _segment_lengths(log_ratio: Tensor, cu_seqlens: Tensor | Sequence[int] | None) -> tuple[int, ...]:
    if log_ratio.dim() == 2 and cu_seqlens is None:
        return (log_ratio.shape[1],) * log_ratio.shape[0]
    if log_ratio.dim() != 1:
        raise ValueError(
            f"log_ratio.shape = {tuple(log_ratio.shape)}: must be [T], or [B, T] without cu_seqlens; reshape it"
        )
    if cu_seqlens is None:
        return (log_ratio.shape[0],)
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    lengths = tuple(end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True))
    if not bounds or bounds[0] != 0 or bounds[-1] != log_ratio.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens = {bounds[:4]}…: must rise from 0 to the number of tokens, {log_ratio.shape[0]}")
    return lengths


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = []
    position = 0
    for length in lengths:
        starts.append(position)
        position += length
    return starts


def _to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    tensor = torch.tensor(numbers, dtype=torch.int64)
    # A copy from pageable memory would make the host wait for the stream.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@lru_cache(maxsize=64)
def _decay_triangle(half_life: float, device: torch.device) -> Tensor:
    """γ^(k−j) at row k, column j ≤ k, else zero: [64, 64] float64."""
    offsets = torch.arange(BLOCK, device=device, dtype=torch.float64)
    distance = offsets[:, None] - offsets[None, :]
    return torch.where(distance >= 0, torch.exp2(-distance.clamp(min=0) / half_life), 0.0)


@lru_cache(maxsize=64)
def _decay_to_block_end(half_life: float, device: torch.device) -> Tensor:
    """γ^(64−j) for offset j in a block: [64] float64."""
    offsets = torch.arange(BLOCK, device=device, dtype=torch.float64)
    return torch.exp2((offsets - BLOCK) / half_life)
