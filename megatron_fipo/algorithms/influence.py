"""From log-ratios to influence weights: which tokens take part, and how the Future-KL becomes a weight."""

import math

import torch
from torch import Tensor

from megatron_fipo.config.algorithm import FipoConfig

SAFE_WEIGHT_FLOOR = 0.8
"""Lower end of the range that `safety_mode = clamp` keeps a weight in; written into the official code."""


def participating_log_ratio(log_ratio: Tensor, advantages: Tensor, config: FipoConfig) -> Tensor:
    """Terms M_k·Δ_k of the Future-KL sum (eq. 5): zero where a ratio is beyond the dual-clip bound.

    Args:
        log_ratio: [T], already zero outside the response.
        advantages: [T].
        config: Which tokens may leave the sum.

    Returns:
        [T], the dtype of `log_ratio`, without gradient.
    """
    values = log_ratio.detach()
    if config.participation_mask == "none":
        return values
    leaves = beyond_dual_clip(values, config.dual_clip)
    if config.participation_mask == "negative_advantage":
        leaves = leaves & (advantages < 0)
    return values.masked_fill(leaves, 0.0)


def beyond_dual_clip(log_ratio: Tensor, dual_clip: float | None) -> Tensor:
    """Whether a token's ratio is above the dual-clip bound c: [T] bool, all false without a bound."""
    if dual_clip is None:
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    return log_ratio > math.log(dual_clip)


def influence_weights(future_kl: Tensor, ratio: Tensor, advantages: Tensor, config: FipoConfig) -> Tensor:
    """Influence weights f_t = clip(exp(F_t), low, high) (eq. 7), then made safe.

    Made safe: a token with a negative advantage and a ratio above the threshold is weighted by 1 at most.

    Args:
        future_kl: [T], F; exp may overflow, the clip brings it back.
        ratio: [T], π_θ / π_old.
        advantages: [T].
        config: Bounds, safety threshold and mode.

    Returns:
        [T], the dtype of `future_kl`, without gradient.
    """
    raw = future_kl.detach().exp()
    weights = raw.clamp(config.influence_clip_low, config.influence_clip_high)
    risky = (advantages < 0) & (ratio.detach() > config.safety_threshold)
    if config.safety_mode == "reset":
        return weights.masked_fill(risky, 1.0)
    return torch.where(risky, weights.clamp(SAFE_WEIGHT_FLOOR, 1.0), weights)
