"""The policy-gradient loss of one packed micro-batch on one context-parallel rank, for every algorithm.

The division of the loss is left to the trainer, who knows the whole mini-batch; `losses` holds the same on plain
[B, T] tensors.

Shapes: t local tokens of the micro-batch, N its sequences.
"""

from dataclasses import dataclass
from typing import assert_never

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.aggregation import SequenceCounts, aggregate
from megatron_fipo.algorithms.future_kl.segments import segment_plan
from megatron_fipo.algorithms.influence import Influence, RatioTerms, beyond_dual_clip, influence
from megatron_fipo.algorithms.loss_metrics import PolicyTerms, mismatch_metrics, policy_metrics, reference_metrics
from megatron_fipo.algorithms.rollout_correction import RolloutCorrection, rollout_correction
from megatron_fipo.algorithms.sequence_means import sequence_means
from megatron_fipo.algorithms.surrogates import (
    Surrogate,
    clipped_log_ratio,
    clipped_surrogate,
    geometric_mean,
    reference_kl,
    sequence_ratio,
    soft_gate,
    truncated_reinforce,
)
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import (
    CispoConfig,
    DapoConfig,
    DrGrpoConfig,
    GmpoConfig,
    GrpoConfig,
    GspoConfig,
    SapoConfig,
)
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import Accumulator, Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """One packed micro-batch as one context-parallel rank holds it.

    What lies outside `response_mask` is never read, be it NaN.

    Attributes:
        log_probs: [t] floating, of the current policy, with gradient.
        old_log_probs: [t] floating, of the policy at the start of the rollout's updates.
        advantages: [t] floating.
        response_mask: [t] bool, response tokens that count.
        response_lengths: [N] int64 on the device, true entries of `response_mask` in the whole of each
            sequence, all ranks together; 0 for filler.
        layout: Where the tokens lie; t = layout.num_local_tokens, N = layout.num_sequences.
        rollout_log_probs: [t] floating, the engine's; for mismatch metrics and `rollout_correction`.
        reference_log_probs: [t] floating, of the reference policy; for `reference_kl_coefficient`.
        entropy: [t] floating, for the metric only.
        response_positions: [R] int64, where `response_mask` is true. Found here if None, which waits for the device.
        sequence_numbers: [N] int64, a number of each sequence that no layout changes; for `influence = shuffled`.
        response_places: [t] integers, the token's place in its response, from 0; for mismatch metrics.
        version_lags: [t] integers, versions that the weights that gave the token are behind those of `old_log_probs`;
            for mismatch metrics.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    response_mask: Tensor
    response_lengths: Tensor
    layout: PackLayout
    rollout_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    response_positions: Tensor | None = None
    sequence_numbers: Tensor | None = None
    response_places: Tensor | None = None
    version_lags: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's share of the loss Σ numerators / Σ denominators.

    Both sums run over the mini-batch's micro-batches and over the data- and context-parallel ranks.

    Attributes:
        numerator: 0-dim float64 with gradient.
        denominator: 0-dim, this rank's share: an int64 count, or the float64 sum of weights (`self_normalize`).
        future_kl: [t], F without gradient (zeros without FIPO).
        influence_weights: [t], f without gradient (ones without FIPO).
        kept_mask: [t] bool, tokens whose surrogate is in the loss: `response_mask` without the sequences that were
            dropped and without what the rollout correction masks.
        dual_clipped: [t] bool, tokens beyond the dual-clip bound with a negative advantage.
        dropped: [N] bool, sequences that the sequence drop takes out; the same on every context-parallel rank.
        metrics: This rank's part of the metrics.
    """

    numerator: Tensor
    denominator: Tensor
    future_kl: Tensor
    influence_weights: Tensor
    kept_mask: Tensor
    dual_clipped: Tensor
    dropped: Tensor
    metrics: Metrics


def policy_loss(inputs: LossInputs, config: AlgorithmConfig, group: dist.ProcessGroup | None = None) -> LossOutput:
    """Numerator, denominator and metrics of the configured loss on one micro-batch.

    In order: log-ratio, clamped → influence weights (FIPO) → surrogate → rollout correction → reference KL → sequence
    drop → aggregation. Under context parallelism FIPO runs one all-gather in `group` and GSPO and GMPO one all-reduce
    (the other algorithms nothing, two controls of FIPO one all-gather more, a rollout correction of whole responses one
    all-reduce more); given `response_positions`, nothing waits for the device.

    Args:
        inputs: The micro-batch.
        config: Which algorithm, with which values.
        group: The context-parallel group; may be None where `inputs.layout.cp_size` is 1.

    Returns:
        A `LossOutput`. A NaN on a response token makes the numerator NaN, in a dropped sequence too.

    Raises:
        ValueError: A shape does not fit the layout, or log-probabilities that the configuration needs are missing.
    """
    _check_inputs(inputs, config)
    terms = _ratio_terms(inputs, config)
    sequences = _sequence_counts(inputs)
    if isinstance(config, FipoConfig):
        clipped = (terms.advantages < 0) & beyond_dual_clip(terms.log_ratio.detach(), config.dual_clip)
        weighing = influence(terms, clipped, inputs.sequence_numbers, inputs.layout, group, config)
        surrogate = clipped_surrogate(terms.ratio, terms.advantages * weighing.weights, config)
        if config.sequence_drop:
            sequences = sequences.dropping(weighing.clipped_counts > config.sequence_drop_max_clipped_tokens)
    else:
        weighing = _no_influence(terms, inputs)
        surrogate, clipped = _baseline(inputs, terms, sequences, config, group)

    correction = _rollout_correction(inputs, sequences, group, config)
    losses = _beside_the_surrogate(inputs, surrogate.losses, correction, config)
    kept_mask = terms.mask & ~sequences.dropped[sequences.sequence_ids]
    # With the masked log-ratio, this keeps what lies outside the response out of value and gradient. A NaN on
    # a response token is let through even where its sequence is dropped: it must stop the run, not vanish.
    losses = torch.where(kept_mask | (terms.mask & losses.isnan()), losses, 0.0)
    numerator, denominator = aggregate(losses, kept_mask, sequences, config)
    if isinstance(config, FipoConfig) and config.self_normalize:
        denominator = torch.where(kept_mask, weighing.weights, 0.0).sum(dtype=torch.float64)
    reported = PolicyTerms(
        kept=kept_mask,
        log_ratio=terms.log_ratio,
        ratio=terms.ratio,
        advantages=terms.advantages,
        clipped=clipped,
        clipped_low=surrogate.clipped_low,
        clipped_high=surrogate.clipped_high,
        future_kl=weighing.future_kl,
        influence_weights=weighing.weights,
        token_losses=losses,
        dropped_sequences=sequences.dropped & sequences.counted_here,
    )
    return LossOutput(
        numerator=numerator,
        denominator=denominator,
        future_kl=weighing.future_kl,
        influence_weights=weighing.weights,
        kept_mask=kept_mask if correction is None else kept_mask & (correction.factors != 0),
        dual_clipped=clipped,
        dropped=sequences.dropped,
        metrics=_metrics(inputs, reported, correction, config),
    )


def _ratio_terms(inputs: LossInputs, config: AlgorithmConfig) -> RatioTerms:
    dtype = torch.promote_types(inputs.log_probs.dtype, torch.float32)
    difference = inputs.log_probs.to(dtype) - inputs.old_log_probs.detach().to(dtype)
    clamp = config.log_ratio_clamp
    log_ratio = torch.where(inputs.response_mask, difference.clamp(-clamp, clamp), 0.0)
    return RatioTerms(
        mask=inputs.response_mask,
        log_ratio=log_ratio,
        ratio=log_ratio.exp(),
        advantages=inputs.advantages.detach().to(dtype),
    )


def _no_influence(terms: RatioTerms, inputs: LossInputs) -> Influence:
    return Influence(
        future_kl=torch.zeros_like(terms.advantages),
        weights=torch.ones_like(terms.advantages),
        clipped_counts=torch.zeros_like(inputs.response_lengths),
    )


def _baseline(
    inputs: LossInputs,
    terms: RatioTerms,
    sequences: SequenceCounts,
    config: AlgorithmConfig,
    group: dist.ProcessGroup | None,
) -> tuple[Surrogate, Tensor]:
    """Token losses of every algorithm but FIPO, and its dual-clipped tokens [t] bool."""
    nothing = torch.zeros_like(terms.mask)
    match config:
        case DapoConfig() | GrpoConfig() | DrGrpoConfig():
            clipped = (terms.advantages < 0) & beyond_dual_clip(terms.log_ratio.detach(), config.dual_clip)
            return clipped_surrogate(terms.ratio, terms.advantages, config), clipped
        case GspoConfig():
            mean = sequence_means(terms.log_ratio, terms.mask, sequences, inputs.layout, group)
            clipped = (terms.advantages < 0) & beyond_dual_clip(mean, config.dual_clip)
            return clipped_surrogate(sequence_ratio(terms.log_ratio, mean), terms.advantages, config), clipped
        case GmpoConfig():
            bounded = clipped_log_ratio(terms.log_ratio, terms.advantages, config)
            mean = sequence_means(bounded, terms.mask, sequences, inputs.layout, group)
            return geometric_mean(bounded, mean, terms.log_ratio, terms.advantages), nothing
        case CispoConfig():
            log_probs = torch.where(terms.mask, inputs.log_probs.to(terms.ratio.dtype), 0.0)
            return truncated_reinforce(log_probs, terms.ratio, terms.advantages, config), nothing
        case SapoConfig():
            return soft_gate(terms.ratio, terms.advantages, config), nothing
        case FipoConfig():
            raise AssertionError("FIPO has its own branch")
    assert_never(config)


def _rollout_correction(
    inputs: LossInputs, sequences: SequenceCounts, group: dist.ProcessGroup | None, config: AlgorithmConfig
) -> RolloutCorrection | None:
    if config.rollout_correction.kind == "none":
        return None
    assert inputs.rollout_log_probs is not None, "checked with the other inputs"
    mask = inputs.response_mask
    difference = inputs.old_log_probs.detach().double() - inputs.rollout_log_probs.detach().double()
    log_ratio = torch.where(mask, difference, 0.0)
    return rollout_correction(log_ratio, mask, sequences, inputs.layout, group, config.rollout_correction)


def _beside_the_surrogate(
    inputs: LossInputs, losses: Tensor, correction: RolloutCorrection | None, config: AlgorithmConfig
) -> Tensor:
    """Token losses with rollout correction and reference KL."""
    mask, dtype = inputs.response_mask, losses.dtype
    if correction is not None:
        losses = losses * correction.factors.to(dtype)
    if config.reference_kl_coefficient > 0:
        assert inputs.reference_log_probs is not None, "checked with the other inputs"
        # Masked first: the terms of garbage could be NaN, and so would be the gradient of what is masked later.
        log_probs = torch.where(mask, inputs.log_probs.to(dtype), 0.0)
        reference = torch.where(mask, inputs.reference_log_probs.to(dtype), 0.0)
        term = reference_kl(log_probs, reference, config.reference_kl_estimator, config.log_ratio_clamp)
        losses = losses + config.reference_kl_coefficient * term
    return losses


def _metrics(
    inputs: LossInputs, terms: PolicyTerms, correction: RolloutCorrection | None, config: AlgorithmConfig
) -> Metrics:
    """Metrics over this rank's response tokens."""
    positions = inputs.response_positions
    if positions is None:
        positions = inputs.response_mask.nonzero().squeeze(1)

    def on_responses(values: Tensor) -> Tensor:
        return values.detach().index_select(0, positions)

    metrics = policy_metrics(terms.at(positions), config)
    if inputs.rollout_log_probs is not None:
        places, lags = inputs.response_places, inputs.version_lags
        metrics |= mismatch_metrics(
            on_responses(inputs.old_log_probs),
            on_responses(inputs.rollout_log_probs),
            None if places is None else on_responses(places),
            None if lags is None else on_responses(lags),
        )
    if correction is not None:
        metrics["train/rollout_importance_mean"] = Accumulator.mean(on_responses(correction.factors))
        metrics["train/rollout_corrected_fraction"] = Accumulator.mean(on_responses(correction.acted))
    if config.reference_kl_coefficient > 0 and inputs.reference_log_probs is not None:
        metrics |= reference_metrics(on_responses(inputs.log_probs), on_responses(inputs.reference_log_probs))
    if inputs.entropy is not None:
        metrics["train/entropy"] = Accumulator.mean(on_responses(inputs.entropy))
    return metrics


def _sequence_counts(inputs: LossInputs) -> SequenceCounts:
    layout = inputs.layout
    chunk_ids = segment_plan(layout.local_chunk_lengths, inputs.log_probs.device).segment_ids
    chunks = len(layout.local_chunk_numbers)
    return SequenceCounts(
        sequence_ids=chunk_ids if chunks == 1 else chunk_ids // chunks,
        response_lengths=inputs.response_lengths,
        dropped=torch.zeros_like(inputs.response_lengths, dtype=torch.bool),
        counted_here=layout.cp_rank == 0,
    )


def _check_inputs(inputs: LossInputs, config: AlgorithmConfig) -> None:
    tokens = (inputs.layout.num_local_tokens,)
    per_token = ("log_probs", "old_log_probs", "advantages", "response_mask")
    others = ("rollout_log_probs", "reference_log_probs", "entropy", "response_places", "version_lags")
    for name in (*per_token, *others):
        value = getattr(inputs, name)
        if value is not None and value.shape != tokens:
            raise ValueError(f"{name}.shape = {tuple(value.shape)}: the layout holds {tokens[0]} tokens on this rank")
    for name in ("response_lengths", "sequence_numbers"):
        value = getattr(inputs, name)
        if value is not None and value.shape != (inputs.layout.num_sequences,):
            raise ValueError(
                f"{name}.shape = {tuple(value.shape)}: the layout has {inputs.layout.num_sequences} sequences"
            )
    if inputs.response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask.dtype = {inputs.response_mask.dtype}: must be torch.bool; call .bool()")
    shuffled = isinstance(config, FipoConfig) and config.influence == "shuffled"
    needed = {
        "rollout_log_probs": ("rollout_correction.kind", config.rollout_correction.kind, "none", "none"),
        "reference_log_probs": ("reference_kl_coefficient", config.reference_kl_coefficient, 0.0, "0"),
        "sequence_numbers": ("influence", "shuffled" if shuffled else None, None, "future_kl"),
    }
    for name, (field, value, off, way_out) in needed.items():
        if value != off and getattr(inputs, name) is None:
            raise ValueError(f"{name} = None: {field} = {value} needs them; pass them, or set it to {way_out}")
