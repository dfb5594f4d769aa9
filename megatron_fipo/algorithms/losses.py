"""The losses on plain [B, T] tensors, one sequence a row, for use in any trainer; torch is all they need."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_fipo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import Metrics, render_metrics


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
    reference_log_probs: Tensor | None = None,
) -> PolicyLoss:
    """FIPO loss on plain tensors, one sequence a row; no process group and no configuration file needed.

    Args:
        log_probs: [B, T] of the current policy, with gradient.
        old_log_probs: [B, T] of the policy at the start of the rollout's updates.
        advantages: [B, T], or [B] for one advantage a sequence.
        response_mask: [B, T] bool, response tokens that count; the rest may hold anything.
        config: For example `FipoConfig.preset("official-32b")`.
        rollout_log_probs: [B, T] of the inference engine, if at hand.
        reference_log_probs: [B, T] of the reference policy; needed with `reference_kl_coefficient` above 0.

    Returns:
        A `PolicyLoss`.

    Raises:
        TypeError: `config` is that of another algorithm.
        ValueError: A shape does not fit, or log-probabilities that the configuration needs are missing.
    """
    if not isinstance(config, FipoConfig):
        raise TypeError(f"config is a {type(config).__name__}: must be a FipoConfig; use policy_loss_on_rows")
    return policy_loss_on_rows(
        log_probs, old_log_probs, advantages, response_mask, config, rollout_log_probs, reference_log_probs
    )


def policy_loss_on_rows(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: AlgorithmConfig,
    rollout_log_probs: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
) -> PolicyLoss:
    """Loss of any algorithm on plain tensors; arguments, result and errors as for `fipo_loss`."""
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
        "reference_log_probs": reference_log_probs,
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
            sequence_numbers=torch.arange(shape[0], device=log_probs.device),
            rollout_log_probs=None if rollout_log_probs is None else rollout_log_probs.reshape(-1),
            reference_log_probs=None if reference_log_probs is None else reference_log_probs.reshape(-1),
        ),
        config,
    )
    return PolicyLoss(
        loss=(output.numerator / torch.where(output.denominator > 0, output.denominator, 1)).to(output.future_kl.dtype),
        future_kl=output.future_kl.reshape(shape),
        influence_weights=output.influence_weights.reshape(shape),
        loss_mask=output.kept_mask.reshape(shape),
        accumulators=output.metrics,
    )
