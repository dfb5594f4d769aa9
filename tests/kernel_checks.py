"""Checks of the Future-KL kernel, for Triton's interpreter on the CPU and for a CUDA device alike.

Each compares with code that shares nothing with the kernel: the definition or its recurrence in float64, and the
influence weights in torch.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_fipo.algorithms.future_kl import kernel, reference
from megatron_fipo.algorithms.future_kl.segments import segment_plan
from megatron_fipo.algorithms.influence import beyond_dual_clip, influence_weights, participating_log_ratio
from megatron_fipo.config.algorithm import FipoConfig

Definition = Callable[[Tensor, float, Sequence[int]], Tensor]


def log_ratios(count: int, seed: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    """Normal values, with a stretch of zeros as behind a mask."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    values[count // 3 : count // 2] = 0.0
    return values.to(dtype)


def check_sums(
    values: Tensor,
    lengths: Sequence[int],
    half_life: float,
    *,
    tile: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    following: Tensor | None = None,
    definition: Definition = reference.future_kl,
) -> Tensor:
    """Every sum is the definition's, to 1e-12 of the sum of its terms' sizes, or to 8 eps of it in `dtype`.

    Where nothing follows the segments, their heads are checked too.
    """
    plan = segment_plan(tuple(lengths), torch.device(device))
    sums = kernel.segmented_reverse_sum(
        values.to(device), half_life, plan, None if following is None else following.to(device), dtype, tile=tile
    )
    assert sums.dtype == dtype and sums.shape == values.shape
    expected, scale = _definition(values, lengths, half_life, following, definition)
    tolerance = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    error = (sums.cpu().double() - expected).abs()
    assert bool((error <= tolerance * scale).all()), f"{float((error - tolerance * scale).max())} over the tolerance"
    if following is None and dtype == torch.float64:
        heads = kernel.segment_heads(values.to(device), half_life, plan, tile=tile).cpu()
        ends = accumulate(lengths)
        expected_heads = [sums[end - length] if length else 0.0 for end, length in zip(ends, lengths, strict=True)]
        assert heads.dtype == torch.float64 and heads.tolist() == [float(each) for each in expected_heads]
    return sums


def check_influence(
    log_ratio: Tensor,
    advantages: Tensor,
    lengths: Sequence[int],
    config: FipoConfig,
    *,
    tile: int,
    device: str = "cpu",
    following: Tensor | None = None,
    definition: Definition = reference.future_kl,
) -> None:
    """Future-KL, weights and counts are those of the definition and of `influence`, with the same decisions."""
    log_ratio, advantages = log_ratio.to(device), advantages.to(device)
    ratio = log_ratio.exp()
    plan = segment_plan(tuple(lengths), torch.device(device))
    placed = None if following is None else following.to(device)
    future_kl, weights, counts = kernel.fused_influence(log_ratio, ratio, advantages, config, plan, placed, tile=tile)
    assert future_kl.dtype == weights.dtype == log_ratio.dtype and counts.dtype == torch.int64

    eps = torch.finfo(log_ratio.dtype).eps
    terms = participating_log_ratio(log_ratio, advantages, config)
    expected, scale = _definition(terms.cpu(), lengths, config.decay_half_life_tokens, following, definition)
    if not config.include_current_token:
        expected -= terms.cpu().double()
    error = (future_kl.cpu().double() - expected).abs()
    assert bool((error <= max(8 * eps, 1e-12) * scale).all())

    # Weights of the very sums that the kernel found: rounding of the sums cannot excuse another decision.
    expected_weights = influence_weights(future_kl, ratio, advantages, config)
    torch.testing.assert_close(weights, expected_weights, rtol=8 * eps, atol=8 * eps)
    assert weights.min() >= torch.tensor(min(config.influence_clip_low, 0.8), dtype=weights.dtype)
    risky = (advantages < 0) & (ratio > config.safety_threshold)
    if config.safety_mode == "reset":
        assert bool((weights[risky] == 1.0).all())
    assert bool((weights[risky] <= 1.0).all())

    clipped = ((advantages < 0) & beyond_dual_clip(log_ratio, config.dual_clip)).cpu()
    ends = list(accumulate(lengths))
    expected_counts = [int(clipped[end - length : end].sum()) for end, length in zip(ends, lengths, strict=True)]
    assert counts.tolist() == expected_counts


def adversarial(count: int, config: FipoConfig, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-ratios between −30 and 30 with ties at every threshold, and advantages of both signs and zero."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio = (torch.rand(count, generator=generator, dtype=torch.float64) * 60 - 30).to(dtype)
    small = torch.rand(count, generator=generator) < 0.6
    log_ratio = torch.where(small, log_ratio * 0.01, log_ratio)
    thresholds = [config.safety_threshold, config.dual_clip or 10.0]
    ties = torch.tensor([math.log(each) for each in thresholds if each < math.inf], dtype=torch.float64).to(dtype)
    up, down = torch.full_like(ties, math.inf), torch.full_like(ties, -math.inf)
    ties = torch.cat([ties, torch.nextafter(ties, up), torch.nextafter(ties, down), ties.new_zeros(1)])
    places = torch.randperm(count, generator=generator)[: count // 3]
    log_ratio[places] = ties[torch.arange(len(places)) % len(ties)]
    advantages = torch.randint(-1, 2, (count,), generator=generator).to(dtype)
    return log_ratio, advantages


def _definition(
    values: Tensor, lengths: Sequence[int], half_life: float, following: Tensor | None, definition: Definition
) -> tuple[Tensor, Tensor]:
    """The sums and the sums of their terms' sizes: what follows a segment is one more token of it."""
    ends = [0, *accumulate(lengths)]
    if following is None:
        values = values.double()
        return definition(values, half_life, ends), definition(values.abs(), half_life, ends)
    pieces, kept = [], []
    for segment, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        pieces += [values[start:end].double(), following[segment : segment + 1]]
        kept += [True] * (end - start) + [False]
    longer, mask = torch.cat(pieces), torch.tensor(kept)
    bounds = [end + segment for segment, end in enumerate(ends)]
    return definition(longer, half_life, bounds)[mask], definition(longer.abs(), half_life, bounds)[mask]
