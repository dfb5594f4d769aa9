"""What a policy loss reports about itself, as accumulators that merge over micro-batches and ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.policy_gradient import ClippedSurrogateConfig
from megatron_fipo.types import Accumulator, Distribution, Metrics

RAW_CLAMP = 20.0
"""What is exponentiated for a metric alone (F of raw influence weights, the mismatch) is kept within ± this, so that
one extreme token cannot make it inf."""

# Reported quantiles, in thousandths.
NEGATIVE_RATIO_QUANTILES = (750, 995, 999)
POSITIVE_RATIO_QUANTILES = (250, 500, 750, 995, 999)
INFLUENCE_QUANTILES = (10, 250, 500, 750, 990, 999)

MISMATCH_BINS = (0, 256, 1024, 4096, 16384)
"""First places in a response, in tokens, of the parts that have a mean mismatch of their own; the last has no end."""

MISMATCH_LAGS = (0, 1, 2, 3, 4, 8)
"""Versions behind, as `MISMATCH_BINS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """The terms of a policy loss on one rank's tokens; all [t] but the last.

    Attributes:
        kept: Whether the token's sequence is not dropped (bool).
        log_ratio: log π_θ − log π_old, clamped.
        ratio: Its exponential.
        advantages: Those of the tokens.
        clipped: Whether the token is beyond the dual-clip bound with a negative advantage (bool).
        clipped_low: Whether a lower bound on the ratio has cut it off (bool); None where there is no such bound.
        clipped_high: The same for an upper bound.
        future_kl: F; zeros without FIPO.
        influence_weights: f; ones without FIPO.
        token_losses: After all clips.
        dropped_sequences: [N] bool, all false on ranks that do not count sequences.
    """

    kept: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    clipped: Tensor
    clipped_low: Tensor | None
    clipped_high: Tensor | None
    future_kl: Tensor
    influence_weights: Tensor
    token_losses: Tensor
    dropped_sequences: Tensor

    def at(self, positions: Tensor) -> "PolicyTerms":
        """The terms of some tokens ([R] int64), without gradient: [t] to [R]."""
        selected = {}
        for field in fields(self):
            values = getattr(self, field.name)
            if values is not None and field.name != "dropped_sequences":
                selected[field.name] = values.detach().index_select(0, positions)
        return replace(self, **selected)


def policy_metrics(terms: PolicyTerms, config: AlgorithmConfig) -> Metrics:
    """Metrics of the surrogate and, for FIPO, of the influence weights, given the terms of the response tokens.

    The catalogue says what each is. `train/loss` is a mean over kept tokens and the step-size ratio is about them;
    everything else is about all response tokens, dropped sequences included.
    """
    metrics: Metrics = {
        "train/loss": Accumulator.mean(terms.token_losses, terms.kept),
        "train/policy_kl": Accumulator.mean(-terms.log_ratio),
        "train/log_ratio_abs_max": Accumulator.max(terms.log_ratio.abs()),
        "train/policy_kl_k3": Accumulator.mean(_k3(terms.log_ratio)),
        "train/length_weighted_advantage": Accumulator.mean(terms.advantages),
        **_ratio_metrics(terms, config),
    }
    if terms.clipped_low is not None:
        metrics["train/clip_fraction_low"] = Accumulator.mean(terms.clipped_low)
    if terms.clipped_high is not None:
        metrics["train/clip_fraction_high"] = Accumulator.mean(terms.clipped_high)
    if isinstance(config, ClippedSurrogateConfig) and config.dual_clip is not None:
        metrics["fipo/dual_clip_fraction"] = Accumulator.mean(terms.clipped)
    if isinstance(config, FipoConfig):
        metrics |= _influence_metrics(terms, config)
    return metrics


def _ratio_metrics(terms: PolicyTerms, config: AlgorithmConfig) -> Metrics:
    """Importance ratios, and those of either sign of the advantage."""
    ratio, positive, negative = terms.ratio, terms.advantages > 0, terms.advantages < 0
    from_4 = ratio >= 4
    if isinstance(config, ClippedSurrogateConfig) and config.dual_clip is not None:
        from_4 = from_4 & (terms.log_ratio <= math.log(config.dual_clip))
    return {
        "train/ratio_mean": Accumulator.mean(ratio),
        "train/ratio_max": Accumulator.max(ratio),
        "train/ratio_negative": Distribution.of(ratio, negative, NEGATIVE_RATIO_QUANTILES),
        "train/ratio_negative_max": Accumulator.max(ratio, negative),
        "train/ratio_negative_count_2_3": Accumulator.sum(negative & (ratio >= 2) & (ratio < 3)),
        "train/ratio_negative_count_3_4": Accumulator.sum(negative & (ratio >= 3) & (ratio < 4)),
        "train/ratio_negative_count_4_c": Accumulator.sum(negative & from_4),
        "train/ratio_positive_min": Accumulator.min(ratio, positive),
        "train/ratio_positive": Distribution.of(ratio, positive, POSITIVE_RATIO_QUANTILES),
        "train/ratio_positive_max": Accumulator.max(ratio, positive),
        "train/ratio_positive_fraction_below_1e3": Accumulator.mean(ratio < 1e-3, positive),
    }


def _influence_metrics(terms: PolicyTerms, config: FipoConfig) -> Metrics:
    future_kl, weights = terms.future_kl, terms.influence_weights
    raw = future_kl.clamp(-RAW_CLAMP, RAW_CLAMP).exp()
    changed = weights != 1
    sizes = torch.where(terms.kept, terms.advantages.abs(), 0.0)
    return {
        "fipo/future_kl_mean": Accumulator.mean(future_kl),
        "fipo/future_kl_square_mean": Accumulator.mean(future_kl.square()),
        "fipo/influence_weight": Distribution.of(weights, None, INFLUENCE_QUANTILES),
        "fipo/influence_weight_mean": Accumulator.mean(weights),
        "fipo/influence_weight_min": Accumulator.min(weights),
        "fipo/influence_weight_max": Accumulator.max(weights),
        "fipo/influence_raw": Distribution.of(raw, None, INFLUENCE_QUANTILES),
        "fipo/influence_raw_mean": Accumulator.mean(raw),
        "fipo/influence_raw_min": Accumulator.min(raw),
        "fipo/influence_raw_max": Accumulator.max(raw),
        "fipo/fraction_changed": Accumulator.mean(changed),
        "fipo/fraction_at_lower_bound": Accumulator.mean(changed & (weights <= config.influence_clip_low)),
        "fipo/fraction_at_upper_bound": Accumulator.mean(changed & (weights >= config.influence_clip_high)),
        "fipo/step_size_ratio": Accumulator.ratio(sizes * weights, sizes),
        "fipo/dropped_sequences": Accumulator.sum(terms.dropped_sequences),
    }


def mismatch_metrics(
    old_log_probs: Tensor, rollout_log_probs: Tensor, places: Tensor | None = None, lags: Tensor | None = None
) -> Metrics:
    """How far the rollout engine's log-probabilities lie from the trainer's on response tokens.

    Args:
        old_log_probs: [R] of the trainer.
        rollout_log_probs: [R] of the engine.
        places: [R] integers, the token's place in its response, from 0; the mean by place is left out without them.
        lags: [R] integers, versions that the token's weights are behind the trainer's; as `places`.
    """
    mismatch = rollout_log_probs.double() - old_log_probs.double()
    metrics: Metrics = {
        "train/mismatch_mean_abs": Accumulator.mean(mismatch.abs()),
        "train/mismatch_max": Accumulator.max(mismatch.abs()),
        "train/mismatch_kl": Accumulator.mean(mismatch),
        "train/mismatch_kl_k3": Accumulator.mean(_k3(-mismatch.clamp(-RAW_CLAMP, RAW_CLAMP))),
    }
    if places is not None:
        metrics |= _means_from("train/mismatch_mean_abs_from", mismatch.abs(), places, MISMATCH_BINS)
    if lags is not None:
        metrics |= _means_from("train/mismatch_mean_abs_from_lag", mismatch.abs(), lags, MISMATCH_LAGS)
    return metrics


def _means_from(name: str, values: Tensor, places: Tensor, starts: Sequence[int]) -> Metrics:
    """Means of the values ([R]) whose places ([R]) lie from one start to the next; the first start takes all before."""
    bins = torch.zeros_like(places, dtype=torch.int64)
    for start in starts[1:]:
        bins += places >= start
    sums = values.new_zeros(2, len(starts))
    sums.index_add_(1, bins, torch.stack([values, torch.ones_like(values)]))
    return {
        f"{name}_{start}": Accumulator("mean", total, count)
        for start, total, count in zip(starts, sums[0], sums[1], strict=True)
    }


def reference_metrics(log_probs: Tensor, reference_log_probs: Tensor) -> Metrics:
    """How far the policy has moved from the reference policy on response tokens: [R], [R]."""
    difference = log_probs.double() - reference_log_probs.double()
    return {
        "train/reference_kl": Accumulator.mean(difference),
        "train/reference_kl_k3": Accumulator.mean(_k3(-difference.clamp(-RAW_CLAMP, RAW_CLAMP))),
    }


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(Δ) − 1 − Δ: for tokens drawn from q and Δ = log p − log q, an estimate of KL(q ‖ p) that is never negative.

    Source: John Schulman, "Approximating KL Divergence", 2020.
    """
    return torch.expm1(log_ratio.double()) - log_ratio
