"""From log-ratios to influence weights: which tokens take part, and how the Future-KL becomes a weight."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.future_kl import kernel
from megatron_fipo.algorithms.future_kl.context_parallel import future_kl as context_parallel_future_kl
from megatron_fipo.algorithms.future_kl.segments import segment_plan
from megatron_fipo.algorithms.influence_controls import shuffle_within_responses, variance_decay
from megatron_fipo.config.algorithm import SAFE_WEIGHT_FLOOR, FipoConfig
from megatron_fipo.parallel.layout import PackLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioTerms:
    """How the policy has moved on one rank's tokens.

    Attributes:
        mask: [t] bool, response tokens that count.
        log_ratio: [t], Δ = log π_θ − log π_old, clamped, zero outside `mask`; with gradient.
        ratio: [t], its exponential; with gradient.
        advantages: [t], arbitrary outside `mask`.
    """

    mask: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """FIPO's weights on one rank's tokens, without gradient.

    Attributes:
        future_kl: [t], F.
        weights: [t], f.
        clipped_counts: [N] int64, dual-clipped tokens of each sequence on all ranks.
    """

    future_kl: Tensor
    weights: Tensor
    clipped_counts: Tensor


def influence(
    terms: RatioTerms,
    clipped: Tensor,
    sequence_numbers: Tensor | None,
    layout: PackLayout,
    group: dist.ProcessGroup | None,
    config: FipoConfig,
) -> Influence:
    """Future-KL and influence weights of a micro-batch (eqs. 5–7), with one all-gather under context parallelism.

    The controls `influence = shuffled` and `decay = variance` gather once more.

    Args:
        terms: How the policy has moved.
        clipped: [t] bool, tokens to count for the sequence drop.
        sequence_numbers: [N] int64, key of the shuffle; may be None without it.
        layout: Where the tokens lie.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.
        config: The rules.
    """
    if layout.cp_size == 1 and config.decay == "constant" and kernel.can_run(terms.log_ratio):
        plan = segment_plan(layout.local_chunk_lengths, terms.log_ratio.device)
        future_kl, weights, counts = kernel.fused_influence(
            terms.log_ratio, terms.ratio, terms.advantages, config, plan
        )
    else:
        future_kl, counts = _future_kl(terms, clipped, layout, group, config)
        weights = influence_weights(future_kl, terms.ratio, terms.advantages, config)
    if config.influence == "constant":
        weights = torch.full_like(future_kl, config.constant_influence)
    if config.influence == "shuffled":
        assert sequence_numbers is not None, "checked with the other inputs"
        weights = shuffle_within_responses(weights, terms.mask, sequence_numbers, layout, group)
    return Influence(future_kl=future_kl, weights=weights, clipped_counts=counts)


def _future_kl(
    terms: RatioTerms,
    clipped: Tensor,
    layout: PackLayout,
    group: dist.ProcessGroup | None,
    config: FipoConfig,
) -> tuple[Tensor, Tensor]:
    """Future-KL [t], and the clipped tokens of every sequence, [N] int64."""
    summed = participating_log_ratio(terms.log_ratio, terms.advantages, config)
    decay = None
    if config.decay == "variance":
        participates = terms.mask & ~_leaves_the_sum(terms.log_ratio.detach(), terms.advantages, config)
        decay = variance_decay(summed, participates, terms.mask, config, layout, group)
    future_kl, counts = context_parallel_future_kl(
        summed, config.decay_half_life_tokens, layout, group, clipped, decay=decay
    )
    return future_kl if config.include_current_token else future_kl - summed, counts


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
    return values.masked_fill(_leaves_the_sum(values, advantages, config), 0.0)


def _leaves_the_sum(log_ratio: Tensor, advantages: Tensor, config: FipoConfig) -> Tensor:
    if config.participation_mask == "none":
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    leaves = beyond_dual_clip(log_ratio, config.dual_clip)
    return leaves & (advantages < 0) if config.participation_mask == "negative_advantage" else leaves


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
    weights = future_kl.detach().exp().clamp(config.influence_clip_low, config.influence_clip_high)
    risky = (advantages < 0) & (ratio.detach() > config.safety_threshold)
    if config.safety_mode == "reset":
        return weights.masked_fill(risky, 1.0)
    return torch.where(risky, weights.clamp(SAFE_WEIGHT_FLOOR, 1.0), weights)
