"""The clipped policy-gradient losses: FIPO, and DAPO and GRPO over the same core.

`policy_loss` works on one packed micro-batch of one context-parallel rank and leaves the division to the
trainer. `fipo_loss`, `dapo_loss` and `grpo_loss` are the same thing on plain [B, T] tensors, for use in any
trainer.

Shapes: t local tokens of a packed micro-batch, N its sequences, B rows, T columns.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.aggregation import SequenceCounts, aggregate
from megatron_fipo.algorithms.future_kl.context_parallel import future_kl as context_parallel_future_kl
from megatron_fipo.algorithms.future_kl.scan import segment_plan
from megatron_fipo.algorithms.influence import beyond_dual_clip, influence_weights, participating_log_ratio
from megatron_fipo.algorithms.loss_metrics import PolicyTerms, mismatch_metrics, policy_metrics
from megatron_fipo.config.algorithm import AlgorithmConfig, DapoConfig, FipoConfig, GrpoConfig
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import Accumulator, Metrics, render_metrics


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
        rollout_log_probs: [t] floating, the engine's; for mismatch metrics and `rollout_importance_cap`.
        entropy: [t] floating, for the metric only.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    response_mask: Tensor
    response_lengths: Tensor
    layout: PackLayout
    rollout_log_probs: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's share of the loss Σ numerators / Σ denominators.

    Both sums run over the mini-batch's micro-batches and over the data- and context-parallel ranks.

    Attributes:
        numerator: 0-dim float64 with gradient.
        denominator: 0-dim int64, this rank's count.
        future_kl: [t], F without gradient (zeros for DAPO and GRPO).
        influence_weights: [t], f without gradient (ones for DAPO and GRPO).
        kept_mask: [t] bool, `response_mask` without the sequences that were dropped.
        metrics: This rank's part of the metrics.
    """

    numerator: Tensor
    denominator: Tensor
    future_kl: Tensor
    influence_weights: Tensor
    kept_mask: Tensor
    metrics: Metrics


def policy_loss(inputs: LossInputs, config: AlgorithmConfig, group: dist.ProcessGroup | None = None) -> LossOutput:
    """Numerator, denominator and metrics of the configured loss on one micro-batch.

    In order: log-ratio, clamped → filter → Future-KL → exp → clip → safety → Ã = A·f → PPO clip → dual clip →
    rollout importance → sequence drop → aggregation (eqs. 3–8, arXiv:2603.19835). FIPO under context
    parallelism runs one all-gather in `group` (see `future_kl.context_parallel`); nothing else communicates,
    and nothing waits for the device.

    Args:
        inputs: The micro-batch.
        config: Which algorithm, with which values.
        group: The context-parallel group; may be None where `inputs.layout.cp_size` is 1.

    Returns:
        A `LossOutput`. A NaN on a response token makes the numerator NaN, in a dropped sequence too.

    Raises:
        ValueError: A shape does not fit the layout, or rollout log-probabilities are needed and missing.
    """
    _check_inputs(inputs, config)
    mask = inputs.response_mask
    dtype = torch.promote_types(inputs.log_probs.dtype, torch.float32)
    old_log_probs = inputs.old_log_probs.detach().to(dtype)
    difference = inputs.log_probs.to(dtype) - old_log_probs
    log_ratio = torch.where(mask, difference.clamp(-config.log_ratio_clamp, config.log_ratio_clamp), 0.0)
    ratio = log_ratio.exp()
    advantages = inputs.advantages.detach().to(dtype)
    clipped = (advantages < 0) & beyond_dual_clip(log_ratio.detach(), config.dual_clip)

    if isinstance(config, FipoConfig):
        future_kl, clipped_counts = context_parallel_future_kl(
            participating_log_ratio(log_ratio, advantages, config),
            config.decay_half_life_tokens,
            inputs.layout,
            group,
            clipped,
        )
        weights = influence_weights(future_kl, ratio, advantages, config)
    else:
        future_kl, weights = torch.zeros_like(advantages), torch.ones_like(advantages)
        clipped_counts = torch.zeros_like(inputs.response_lengths)

    losses = clipped_surrogate(ratio, advantages * weights, config)
    metrics: Metrics = {}
    if inputs.rollout_log_probs is not None:
        rollout_log_probs = inputs.rollout_log_probs.detach().to(dtype)
        metrics |= mismatch_metrics(old_log_probs, rollout_log_probs, mask)
        if config.rollout_importance_cap is not None:
            importance = (old_log_probs - rollout_log_probs).exp().clamp(max=config.rollout_importance_cap)
            losses = losses * importance
            metrics["train/rollout_importance_mean"] = Accumulator.mean(importance, mask)
    if inputs.entropy is not None:
        metrics["train/entropy"] = Accumulator.mean(inputs.entropy, mask)

    sequences = _sequence_counts(inputs, clipped_counts, config)
    kept_mask = mask & ~sequences.dropped[sequences.sequence_ids]
    # With the masked log-ratio, this keeps what lies outside the response out of value and gradient. A NaN on
    # a response token is let through even where its sequence is dropped: it must stop the run, not vanish.
    losses = torch.where(kept_mask | (mask & losses.isnan()), losses, 0.0)
    numerator, denominator = aggregate(losses, kept_mask, sequences, config.aggregation)
    terms = PolicyTerms(
        mask=mask,
        kept_mask=kept_mask,
        log_ratio=log_ratio.detach(),
        ratio=ratio.detach(),
        advantages=advantages,
        clipped=clipped,
        future_kl=future_kl,
        influence_weights=weights,
        token_losses=losses.detach(),
        dropped_sequences=sequences.dropped & sequences.counted_here,
    )
    return LossOutput(
        numerator=numerator,
        denominator=denominator,
        future_kl=future_kl,
        influence_weights=weights,
        kept_mask=kept_mask,
        metrics=policy_metrics(terms, config) | metrics,
    )


def clipped_surrogate(ratio: Tensor, advantages: Tensor, config: AlgorithmConfig) -> Tensor:
    """Negated PPO surrogate −min(r·A, clip(r)·A), and for A < 0 at most the dual-clip bound −c·A (eq. 8).

    Args:
        ratio: [t], π_θ / π_old, with gradient.
        advantages: [t], already weighted (Ã).
        config: Clip bounds.

    Returns:
        [t] token losses, to be minimised.
    """
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    if config.dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * config.dual_clip), losses)


def _sequence_counts(inputs: LossInputs, clipped_counts: Tensor, config: AlgorithmConfig) -> SequenceCounts:
    layout = inputs.layout
    dropped = torch.zeros_like(inputs.response_lengths, dtype=torch.bool)
    if isinstance(config, FipoConfig) and config.sequence_drop:
        dropped = clipped_counts > config.sequence_drop_max_clipped_tokens
    chunk_ids = segment_plan(layout.local_chunk_lengths, inputs.log_probs.device).segment_ids
    return SequenceCounts(
        sequence_ids=chunk_ids // len(layout.local_chunk_numbers),
        response_lengths=inputs.response_lengths,
        dropped=dropped,
        counted_here=layout.cp_rank == 0,
    )


def _check_inputs(inputs: LossInputs, config: AlgorithmConfig) -> None:
    tokens = (inputs.layout.num_local_tokens,)
    for name in ("log_probs", "old_log_probs", "advantages", "response_mask", "rollout_log_probs", "entropy"):
        value = getattr(inputs, name)
        if value is not None and value.shape != tokens:
            raise ValueError(f"{name}.shape = {tuple(value.shape)}: the layout holds {tokens[0]} tokens on this rank")
    if inputs.response_lengths.shape != (inputs.layout.num_sequences,):
        raise ValueError(
            f"response_lengths.shape = {tuple(inputs.response_lengths.shape)}: the layout has "
            f"{inputs.layout.num_sequences} sequences"
        )
    if inputs.response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask.dtype = {inputs.response_mask.dtype}: must be torch.bool; call .bool()")
    if config.rollout_importance_cap is not None and inputs.rollout_log_probs is None:
        raise ValueError(
            f"rollout_log_probs = None: rollout_importance_cap = {config.rollout_importance_cap} needs them; "
            "pass them, or set the cap to null"
        )


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A loss on [B, T] rows.

    Attributes:
        loss: 0-dim, with gradient, averaged as the config says; exactly zero where no token is left.
        future_kl: [B, T], F without gradient.
        influence_weights: [B, T], f without gradient.
        loss_mask: [B, T] bool, tokens in the loss after the sequence drop.
        accumulators: The metrics on the device, to be merged with those of other batches.
    """

    loss: Tensor
    future_kl: Tensor
    influence_weights: Tensor
    loss_mask: Tensor
    accumulators: Metrics

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The metrics as numbers, fetched at the first use; a mean over no token is left out."""
        return render_metrics(self.accumulators)


def fipo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: FipoConfig,
    rollout_log_probs: Tensor | None = None,
) -> PolicyLoss:
    """FIPO loss on plain tensors, one sequence a row; no process group and no configuration file needed.

    Args:
        log_probs: [B, T] of the current policy, with gradient.
        old_log_probs: [B, T] of the policy at the start of the rollout's updates.
        advantages: [B, T], or [B] for one advantage a sequence.
        response_mask: [B, T] bool, response tokens that count; the rest may hold anything.
        config: For example `FipoConfig.preset("official-32b")`.
        rollout_log_probs: [B, T] of the inference engine, if at hand.

    Returns:
        A `PolicyLoss`.
    """
    return _loss_on_rows(log_probs, old_log_probs, advantages, response_mask, config, rollout_log_probs)


def dapo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: DapoConfig,
    rollout_log_probs: Tensor | None = None,
) -> PolicyLoss:
    """DAPO loss on plain tensors; arguments and result as for `fipo_loss`."""
    return _loss_on_rows(log_probs, old_log_probs, advantages, response_mask, config, rollout_log_probs)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: GrpoConfig,
    rollout_log_probs: Tensor | None = None,
) -> PolicyLoss:
    """GRPO loss on plain tensors; arguments and result as for `fipo_loss`."""
    return _loss_on_rows(log_probs, old_log_probs, advantages, response_mask, config, rollout_log_probs)


def _loss_on_rows(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: AlgorithmConfig,
    rollout_log_probs: Tensor | None,
) -> PolicyLoss:
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs.shape = {tuple(log_probs.shape)}: must be [B, T]; add a batch dimension")
    shape = log_probs.shape
    if tuple(advantages.shape) in ((shape[0],), (shape[0], 1)):
        advantages = advantages.reshape(-1, 1).expand(shape)
    given = {
        "old_log_probs": old_log_probs,
        "advantages": advantages,
        "response_mask": response_mask,
        "rollout_log_probs": rollout_log_probs,
    }
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}.shape = {tuple(tensor.shape)}: must be {tuple(shape)}, as log_probs; reshape it")
    mask = response_mask.bool()
    output = policy_loss(
        LossInputs(
            log_probs=log_probs.reshape(-1),
            old_log_probs=old_log_probs.reshape(-1),
            advantages=advantages.reshape(-1),
            response_mask=mask.reshape(-1),
            response_lengths=mask.sum(dim=1),
            layout=PackLayout((shape[1],) * shape[0]),
            rollout_log_probs=None if rollout_log_probs is None else rollout_log_probs.reshape(-1),
        ),
        config,
    )
    return PolicyLoss(
        loss=(output.numerator / output.denominator.clamp(min=1)).to(output.future_kl.dtype),
        future_kl=output.future_kl.reshape(shape),
        influence_weights=output.influence_weights.reshape(shape),
        loss_mask=output.kept_mask.reshape(shape),
        accumulators=output.metrics,
    )
