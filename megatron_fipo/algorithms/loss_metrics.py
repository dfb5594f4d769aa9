"""What a policy loss reports about itself, as accumulators that merge over micro-batches and ranks."""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """The terms of a policy loss on one rank's tokens, without gradient; all [t] but the last.

    Attributes:
        mask: Response tokens (bool).
        kept_mask: Those of sequences that are not dropped (bool).
        log_ratio: log π_θ − log π_old, clamped; zero outside `mask`.
        ratio: Its exponential.
        advantages: Arbitrary outside `mask`.
        clipped: Tokens beyond the dual-clip bound with a negative advantage (bool).
        clipped_low: Tokens that a lower bound on the ratio has cut off (bool); None where there is no such bound.
        clipped_high: The same for an upper bound.
        future_kl: F; zeros without FIPO.
        influence_weights: f; ones without FIPO.
        token_losses: After all clips.
        dropped_sequences: [N] bool, all false on ranks that do not count sequences.
    """

    mask: Tensor
    kept_mask: Tensor
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


def policy_metrics(terms: PolicyTerms, config: AlgorithmConfig) -> Metrics:
    """Metrics of the surrogate and, for FIPO, of the influence weights; the catalogue says what each is.

    `train/loss` is a mean over kept tokens and the step-size ratio is about them; everything else is about all
    response tokens, dropped sequences included.
    """
    mask = terms.mask
    metrics: Metrics = {
        "train/loss": Accumulator.mean(terms.token_losses, terms.kept_mask),
        "train/policy_kl": Accumulator.mean(-terms.log_ratio, mask),
        "train/policy_kl_k3": Accumulator.mean(_k3(terms.log_ratio), mask),
        "train/length_weighted_advantage": Accumulator.mean(terms.advantages, mask),
        **_ratio_metrics(terms, config),
    }
    if terms.clipped_low is not None:
        metrics["train/clip_fraction_low"] = Accumulator.mean(terms.clipped_low, mask)
    if terms.clipped_high is not None:
        metrics["train/clip_fraction_high"] = Accumulator.mean(terms.clipped_high, mask)
    if isinstance(config, ClippedSurrogateConfig) and config.dual_clip is not None:
        metrics["fipo/dual_clip_fraction"] = Accumulator.mean(terms.clipped, mask)
    if isinstance(config, FipoConfig):
        metrics |= _influence_metrics(terms, config)
    return metrics


def _ratio_metrics(terms: PolicyTerms, config: AlgorithmConfig) -> Metrics:
    """Importance ratios, and those of either sign of the advantage."""
    ratio = terms.ratio
    positive, negative = terms.mask & (terms.advantages > 0), terms.mask & (terms.advantages < 0)
    from_4 = ratio >= 4
    if isinstance(config, ClippedSurrogateConfig) and config.dual_clip is not None:
        from_4 = from_4 & (ratio <= config.dual_clip)
    return {
        "train/ratio_mean": Accumulator.mean(ratio, terms.mask),
        "train/ratio_max": Accumulator.max(ratio, terms.mask),
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
    mask = terms.mask
    future_kl = terms.future_kl
    weights = terms.influence_weights
    raw = future_kl.double().clamp(-RAW_CLAMP, RAW_CLAMP).exp()
    changed = weights != 1
    return {
        "fipo/future_kl_mean": Accumulator.mean(future_kl, mask),
        "fipo/future_kl_square_mean": Accumulator.mean(future_kl.double().square(), mask),
        "fipo/influence_weight": Distribution.of(weights, mask, INFLUENCE_QUANTILES),
        "fipo/influence_weight_mean": Accumulator.mean(weights, mask),
        "fipo/influence_weight_min": Accumulator.min(weights, mask),
        "fipo/influence_weight_max": Accumulator.max(weights, mask),
        "fipo/influence_raw": Distribution.of(raw, mask, INFLUENCE_QUANTILES),
        "fipo/influence_raw_mean": Accumulator.mean(raw, mask),
        "fipo/influence_raw_min": Accumulator.min(raw, mask),
        "fipo/influence_raw_max": Accumulator.max(raw, mask),
        "fipo/fraction_changed": Accumulator.mean(changed, mask),
        "fipo/fraction_at_lower_bound": Accumulator.mean(changed & (weights <= config.influence_clip_low), mask),
        "fipo/fraction_at_upper_bound": Accumulator.mean(changed & (weights >= config.influence_clip_high), mask),
        "fipo/step_size_ratio": Accumulator.ratio(
            (terms.advantages * weights).abs(), terms.advantages.abs(), terms.kept_mask
        ),
        "fipo/dropped_sequences": Accumulator.sum(terms.dropped_sequences),
    }


def mismatch_metrics(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Metrics:
    """How far the rollout engine's log-probabilities lie from the trainer's: [t], [t], [t] bool."""
    mismatch = torch.where(mask, rollout_log_probs.double() - old_log_probs.double(), 0.0)
    return {
        "train/mismatch_mean_abs": Accumulator.mean(mismatch.abs(), mask),
        "train/mismatch_max": Accumulator.max(mismatch.abs(), mask),
        "train/mismatch_kl": Accumulator.mean(mismatch, mask),
        "train/mismatch_kl_k3": Accumulator.mean(_k3(-mismatch.clamp(-RAW_CLAMP, RAW_CLAMP)), mask),
    }


def reference_metrics(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Metrics:
    """How far the policy has moved from the reference policy: [t], [t], [t] bool."""
    difference = torch.where(mask, log_probs.double() - reference_log_probs.double(), 0.0)
    return {
        "train/reference_kl": Accumulator.mean(difference, mask),
        "train/reference_kl_k3": Accumulator.mean(_k3(-difference.clamp(-RAW_CLAMP, RAW_CLAMP)), mask),
    }


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(Δ) − 1 − Δ: for tokens drawn from q and Δ = log p − log q, an estimate of KL(q ‖ p) that is never negative.

    Source: John Schulman, "Approximating KL Divergence", 2020.
    """
    return torch.expm1(log_ratio.double()) - log_ratio
