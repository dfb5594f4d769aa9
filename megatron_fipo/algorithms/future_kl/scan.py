"""The Future-KL in linear time: a decayed sum from the right inside every segment of a packed tensor.

Every segment is cut into blocks of 32 tokens, the last one filled up with zeros. The sums at the block heads, one
product with a column of decay powers, are themselves summed over the blocks of their segment in the same way, with
the half-life counted in blocks. What that gives for the next block is added, decayed once, to a block's last token;
one product with a 32 × 32 triangle of decay powers then sums inside all blocks at once. The cost is O(32·T), without a
loop over tokens. All sums are float64, so that neither the packing nor TF32 shows in the result.

On CUDA, where Triton is installed, `kernel` takes the same sums in one pass.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from megatron_fipo.algorithms.future_kl import kernel
from megatron_fipo.algorithms.future_kl.segments import BLOCK, SegmentPlan, segment_plan

_BLOCKS_AT_ONCE = 2048


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
    values = log_ratio.detach().reshape(-1)
    return segmented_reverse_sum(values, decay_half_life_tokens, plan, dtype=result_dtype(log_ratio)).view_as(log_ratio)


def segmented_reverse_sum(
    values: Tensor,
    half_life: float,
    plan: SegmentPlan,
    following: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sum from the right with decay inside every segment: y_t = x_t + γ·y_{t+1}, γ = 2^(−1/half_life).

    Args:
        values: [T], any floating dtype.
        half_life: In tokens; may be infinite.
        plan: Where the segments lie.
        following: [S] float64, y of the token behind each segment's last; zero by default.
        dtype: What the sums, taken in float64, are rounded to.

    Returns:
        [T] of `dtype`.
    """
    if plan.num_values == 0:
        return values.to(dtype)
    if kernel.can_run(values):
        return kernel.segmented_reverse_sum(values, half_life, plan, following, dtype)
    blocks = plan.to_blocks(values)
    triangle = _decay_triangle(half_life, values.device)
    decay = 2.0 ** (-1.0 / half_life)
    if following is not None:
        blocks.view(-1).index_add_(0, plan.last_slots, decay * following[plan.occupied])
    if plan.blocks is not None:
        heads = segmented_reverse_sum(blocks @ triangle[:, 0], half_life / BLOCK, plan.blocks)
        blocks[:, -1].add_(plan.next_heads(heads), alpha=decay)
    # Part by part, so that the products stay in the cache, and in place where they can: fresh memory costs most.
    sums = blocks if dtype == blocks.dtype else torch.empty_like(blocks, dtype=dtype)
    parts = (torch.split(each, _BLOCKS_AT_ONCE) for each in (blocks, sums))
    for part, summed in zip(*parts, strict=True):
        summed.copy_(part @ triangle)
    return plan.from_blocks(sums)


def segment_heads(values: Tensor, half_life: float, plan: SegmentPlan) -> Tensor:
    """What `segmented_reverse_sum` gives for the first value of every segment: [T] to [S] float64, zero where empty."""
    if kernel.can_run(values):
        return kernel.segment_heads(values, half_life, plan)
    result = torch.zeros(len(plan.lengths), dtype=torch.float64, device=values.device)
    while plan.num_values:
        values = plan.to_blocks(values) @ _decay_triangle(half_life, values.device)[:, 0]
        half_life /= BLOCK
        if plan.blocks is None:
            return result.index_copy_(0, plan.occupied, values)
        plan = plan.blocks
    return result


def segmented_reverse_scan(values: Tensor, decay: Tensor, plan: SegmentPlan) -> tuple[Tensor, Tensor]:
    """The same with a decay for every value: y_t = x_t + γ_t·y_{t+1}, and what y behind the segment is multiplied by.

    Inside a block by doubling: after step s every value has the sum and the product over the s next ones. There is no
    division, so that decays of 0 and 1 are exact.

    Args:
        values: [T], any floating dtype.
        decay: [T], γ_t in [0, 1].
        plan: Where the segments lie.

    Returns:
        y [T] and the products of the decays from t to the end of the segment [T], both float64.
    """
    if plan.num_values == 0:
        return values.double(), decay.double()
    sums, products = plan.to_blocks(values), plan.to_blocks(decay, fill=1.0)
    step = 1
    while step < BLOCK:
        sums[:, :-step] += products[:, :-step] * sums[:, step:]
        products[:, :-step] = products[:, :-step] * products[:, step:]
        step *= 2
    if plan.blocks is not None:
        head_sums, head_products = segmented_reverse_scan(sums[:, 0], products[:, 0], plan.blocks)
        sums.addcmul_(products, plan.next_heads(head_sums)[:, None])
        products *= plan.next_heads(head_products, behind=1.0)[:, None]
    return plan.from_blocks(sums), plan.from_blocks(products)


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


@lru_cache(maxsize=64)
def _decay_triangle(half_life: float, device: torch.device) -> Tensor:
    """γ^(k−j) at row k, column j ≤ k, else zero: [32, 32] float64."""
    offsets = torch.arange(BLOCK, device=device, dtype=torch.float64)
    distance = offsets[:, None] - offsets[None, :]
    return torch.where(distance >= 0, torch.exp2(-distance.clamp(min=0) / half_life), 0.0)
