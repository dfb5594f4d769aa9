"""What a policy loss reports about itself, as accumulators that merge over micro-batches and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.types import Accumulator, Metrics

RAW_FUTURE_KL_CLAMP = 20.0
"""Raw influence weights are reported as exp(F) with F within ± this, so that one extreme token cannot make
them inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """The terms of a policy loss on one rank's tokens, without gradient; all [t] but the last.

    Attributes:
        mask: Response tokens (bool).
        kept_mask: Those of sequences that are not dropped (bool).
        log_ratio: log π_θ − log π_old, clamped; zero outside `mask`.
        ratio: Its exponential.
        advantages: Arbitrary outside `mask`.
        clipped: Response tokens beyond the dual-clip bound with a negative advantage (bool).
        future_kl: F; zeros for DAPO and GRPO.
        influence_weights: f; ones for DAPO and GRPO.
        token_losses: After all clips.
        dropped_sequences: [N] bool, all false on ranks that do not count sequences.
    """

    mask: Tensor
    kept_mask: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    clipped: Tensor
    future_kl: Tensor
    influence_weights: Tensor
    token_losses: Tensor
    dropped_sequences: Tensor


def policy_metrics(terms: PolicyTerms, config: AlgorithmConfig) -> Metrics:
    """Metrics of the clipped surrogate and, for FIPO, of the influence weights.

    `train/loss` is a mean over kept tokens; every other mean is over all response tokens, dropped sequences
    included.
    """
    mask = terms.mask
    high = (terms.advantages > 0) & (terms.ratio > 1 + config.clip_high)
    low = (terms.advantages < 0) & (terms.ratio < 1 - config.clip_low)
    metrics: Metrics = {
        "train/loss": Accumulator.mean(terms.token_losses, terms.kept_mask),
        "train/policy_kl": Accumulator.mean(-terms.log_ratio, mask),
        "train/ratio_mean": Accumulator.mean(terms.ratio, mask),
        "train/ratio_max": Accumulator.max(terms.ratio, mask),
        "train/clip_fraction_low": Accumulator.mean(low, mask),
        "train/clip_fraction_high": Accumulator.mean(high, mask),
        "train/length_weighted_advantage": Accumulator.mean(terms.advantages, mask),
    }
    if config.dual_clip is not None:
        metrics["fipo/dual_clip_fraction"] = Accumulator.mean(terms.clipped, mask)
    if isinstance(config, FipoConfig):
        metrics |= _influence_metrics(terms, config)
    return metrics


def _influence_metrics(terms: PolicyTerms, config: FipoConfig) -> Metrics:
    mask = terms.mask
    future_kl = terms.future_kl
    weights = terms.influence_weights
    raw = future_kl.double().clamp(-RAW_FUTURE_KL_CLAMP, RAW_FUTURE_KL_CLAMP).exp()
    changed = weights != 1
    return {
        "fipo/future_kl_mean": Accumulator.mean(future_kl, mask),
        "fipo/future_kl_square_mean": Accumulator.mean(future_kl.double().square(), mask),
        "fipo/influence_weight_mean": Accumulator.mean(weights, mask),
        "fipo/influence_weight_min": Accumulator.min(weights, mask),
        "fipo/influence_weight_max": Accumulator.max(weights, mask),
        "fipo/influence_raw_mean": Accumulator.mean(raw, mask),
        "fipo/influence_raw_min": Accumulator.min(raw, mask),
        "fipo/influence_raw_max": Accumulator.max(raw, mask),
        "fipo/fraction_changed": Accumulator.mean(changed, mask),
        "fipo/fraction_at_lower_bound": Accumulator.mean(changed & (weights <= config.influence_clip_low), mask),
        "fipo/fraction_at_upper_bound": Accumulator.mean(changed & (weights >= config.influence_clip_high), mask),
        "fipo/dropped_sequences": Accumulator.sum(terms.dropped_sequences),
    }


def rollout_metrics(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Metrics:
    """How far the rollout engine's log-probabilities lie from the trainer's: [t], [t], [t] bool."""
    mismatch = torch.where(mask, rollout_log_probs.double() - old_log_probs.double(), 0.0)
    return {
        "train/mismatch_mean_abs": Accumulator.mean(mismatch.abs(), mask),
        "train/mismatch_kl": Accumulator.mean(mismatch, mask),
    }
