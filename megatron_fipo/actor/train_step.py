"""One optimizer step on one mini-batch.

The loss of a mini-batch is Σ numerators / D, with D summed over micro-batches, data- and context-parallel ranks.
Every loss function gives its unnormalised sum and its local share of D. megatron-core reduces the gradient of the sum
and divides it by nothing; it is divided by D here, once, before clipping. (megatron-core's own division clamps D to 1
and knows 32-bit integers alone.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_fipo.actor.forward import ActorForward, LossFunction, Scores
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.non_finite import first_non_finite_token, trace_gradients
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.random_states import RandomStates
from megatron_fipo.actor.token_records import TokenRecorder
from megatron_fipo.algorithms.policy_loss import LossInputs, LossOutput, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.metrics.reduce import reduce_metrics
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import Accumulator, Distribution, merge_metrics, render_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one update did; the same on every rank.

    Attributes:
        applied: Whether the weights changed.
        skip_reason: Why not, or "".
        is_finite: Whether loss sum and gradient norm are finite.
        loss: Σ numerators / D; NaN where no token is kept.
        kept_tokens: Response tokens of sequences that were not dropped.
        denominator: D: a whole number of tokens or sequences, or a sum of weights.
        grad_norm: Global norm before clipping; 0 where D is 0.
        learning_rate: Rate the step was taken with.
        metrics: Rendered metrics of the loss.
    """

    applied: bool
    skip_reason: str
    is_finite: bool
    loss: float
    kept_tokens: int
    denominator: float
    grad_norm: float
    learning_rate: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the loss saw and made of one micro-batch; without gradient.

    Attributes:
        log_probs: [t] of the actor.
        output: What the loss made of them, its metrics left out.
    """

    log_probs: Tensor
    output: LossOutput


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an update was computed from, on this rank.

    Attributes:
        micro_batches: This rank's micro-batches.
        seen: One entry each on the last pipeline stage; elsewhere none.
        random_states: Those that the update began with.
    """

    micro_batches: Sequence[MicroBatch]
    seen: Sequence[Seen]
    random_states: RandomStates


def apply_always(metrics: Mapping[str, float]) -> str:
    """No objection to any update."""
    return ""


class TrainStep:
    """Runs updates with one model, optimizer and algorithm.

    Args:
        forward: The actor's forward pass.
        optimizer: The actor's optimizer.
        algorithm: Policy loss.
        context: This rank's place.
        quantiles: Whether updates report quantiles, too.

    Attributes:
        recorder: Keeps the tokens of chosen sequences.
        evidence: Of the last update, until it is set to None: 26 bytes a token.
    """

    def __init__(
        self,
        forward: ActorForward,
        optimizer: ActorOptimizer,
        algorithm: AlgorithmConfig,
        context: ParallelContext,
        quantiles: bool = True,
    ) -> None:
        self.forward, self.optimizer, self.algorithm, self.context = forward, optimizer, algorithm, context
        self.quantiles = quantiles
        self.recorder = TokenRecorder(context)
        self.evidence: Evidence | None = None
        self._denominators: list[Tensor] = []
        self._denominator: Tensor | None = None
        provider = forward.provider
        provider.finalize_model_grads_func = self._finalize_gradients
        if provider.bf16:
            provider.grad_scale_func = optimizer.optimizer.scale_loss
        if forward.chunks[0].ddp_config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in forward.chunks]
            provider.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        policy_version: int | None = None,
        refusal: Callable[[Mapping[str, float]], str] = apply_always,
    ) -> UpdateResult:
        """Take one optimizer step; collective over all ranks.

        Nothing changes when no token is left after sequence drops, or when loss or gradient is not finite.

        Args:
            micro_batches: This rank's micro-batches of the mini-batch, `old_log_probs` set on the last stage.
            policy_version: Version of the weights that `old_log_probs` are of; without it nothing is told by version.
            refusal: Says from the metrics of a finite loss, which all ranks have alike, why nothing is to change; ""
                lets the step be taken.
        """
        self.evidence, random_states = None, RandomStates.now()
        self.optimizer.zero_grad()
        self._denominators, self._denominator = [], None
        learning_rate = self.optimizer.learning_rate
        parts = self.forward.run(micro_batches, partial(self._loss_function, policy_version), forward_only=False)
        self.evidence = Evidence(micro_batches, [part["seen"] for part in parts], random_states)
        assert self._denominator is not None, "the schedule did not finalize the gradients"
        denominator = float(self._denominator.item())
        summary = self._summarise(micro_batches, parts)
        if self.forward.routing is not None:
            summary["metrics"] |= self.forward.routing.take_metrics()
        loss = summary["numerator"] / denominator if summary["kept_tokens"] else math.nan
        grad_norm, applied = 0.0, False
        if summary["culprit"]:
            reason = f"the loss is {summary['numerator']}, first in {summary['culprit']}"
        elif summary["kept_tokens"] == 0:
            reason = "no response token is left to learn from (all masked, or every sequence dropped)"
        else:
            reason = refusal(summary["metrics"])
            outcome = self.optimizer.step(apply=not reason)
            grad_norm, applied = outcome.grad_norm, outcome.applied
            if not math.isfinite(grad_norm):
                reason = f"the gradient norm is {grad_norm}, the loss is finite; {self._trace_gradient()}"
        return UpdateResult(
            applied=applied,
            skip_reason=reason,
            is_finite=not summary["culprit"] and math.isfinite(grad_norm),
            loss=loss,
            kept_tokens=int(summary["kept_tokens"]),
            denominator=denominator,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            metrics=summary["metrics"],
        )

    def _loss_function(self, policy_version: int | None, micro_batch: MicroBatch) -> LossFunction:
        def loss(scores: Scores) -> tuple[Tensor, Tensor, dict[str, Any]]:
            assert micro_batch.old_log_probs is not None, "old log-probabilities come before the first update"
            output = policy_loss(
                LossInputs(
                    log_probs=scores["log_probs"],
                    old_log_probs=micro_batch.old_log_probs,
                    advantages=micro_batch.advantages,
                    response_mask=micro_batch.response_mask,
                    response_lengths=micro_batch.response_lengths,
                    layout=micro_batch.layout,
                    sequence_numbers=micro_batch.sequence_numbers,
                    rollout_log_probs=micro_batch.rollout_log_probs,
                    reference_log_probs=micro_batch.reference_log_probs,
                    entropy=scores["entropy"],
                    response_positions=micro_batch.response_positions,
                    response_places=micro_batch.response_places,
                    version_lags=None if policy_version is None else policy_version - micro_batch.policy_versions,
                ),
                self.algorithm,
                group=self.context.cp_group,
            )
            self.recorder.keep(micro_batch, scores, output)
            metrics = output.metrics | {"kept_tokens": Accumulator.sum(output.kept_mask)}
            kept = replace(output, numerator=output.numerator.detach(), metrics={})
            seen = Seen(scores["log_probs"].detach(), kept)
            report = {"numerator": kept.numerator, "metrics": metrics, "seen": seen}
            self._denominators.append(output.denominator)
            # megatron-core adds up its own count, which nothing reads.
            return output.numerator, torch.zeros_like(output.denominator, dtype=torch.int), report

        return loss

    def _finalize_gradients(self, model: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
        """Reduce the gradient and divide it by D; without anything to divide by it becomes zero."""
        finalize_model_grads(model, None, **kwargs)
        self._denominator = self._sum_denominators()
        scale = torch.where(self._denominator > 0, 1.0 / self._denominator, 0.0).float()
        for chunk in model:
            chunk.scale_gradients(scale)

    def _sum_denominators(self) -> Tensor:
        """D on every rank: 0-dim float64, exact for counts below 2^53."""
        total = torch.zeros([], dtype=torch.float64, device=compute_device())
        for part in self._denominators:
            total += part
        context = self.context
        dist.all_reduce(total, group=context.dp_cp_group)
        if context.pp_size > 1:
            last = dist.get_global_rank(context.pp_group, context.pp_size - 1)
            dist.broadcast(total, src=last, group=context.pp_group)
        return total

    def _summarise(self, micro_batches: Sequence[MicroBatch], parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Loss sum and metrics over all ranks, the same on all ranks."""
        context = self.context
        summary: dict[str, Any] = {}
        if context.is_pipeline_last_stage:
            numerators = torch.stack([part["numerator"] for part in parts])
            metrics = merge_metrics([part["metrics"] for part in parts])
            metrics["numerator"] = Accumulator.sum(numerators)
            if not self.quantiles:
                metrics = {key: value for key, value in metrics.items() if not isinstance(value, Distribution)}
            rendered = render_metrics(reduce_metrics(metrics, context.dp_cp_group))
            summary = {key: rendered.pop(key) for key in ("numerator", "kept_tokens")}
            summary |= {"metrics": rendered, "culprit": ""}
            if not math.isfinite(summary["numerator"]):
                summary["culprit"] = self._find_culprit(micro_batches, parts)
        # Ranks that disagree about an update, one of which has seen a NaN, would wait for each other for ever.
        for group, source in ((context.tp_group, 0), (context.pp_group, context.pp_size - 1)):
            if group.size() > 1:
                summary = broadcast_json(summary, dist.get_global_rank(group, source), group)
        return summary

    def _find_culprit(self, micro_batches: Sequence[MicroBatch], parts: list[dict[str, Any]]) -> str:
        """Where the loss is not finite first: rank, micro-batch, its sequences in the rollout batch, and the token."""
        finite = torch.stack([part["numerator"] for part in parts]).isfinite().tolist()
        mine = []
        for number in [number for number, ok in enumerate(finite) if not ok][:1]:
            token = first_non_finite_token(micro_batches[number], parts[number]["seen"].log_probs)
            mine.append([self.context.rank, number, list(micro_batches[number].sequences), token])
        found = [entry for part in gather_json(mine, self.context.dp_cp_group) for entry in part]
        rank, number, sequences, token = found[0]
        where = f"micro-batch {number} of rank {rank} (sequences {sequences} of the rollout batch)"
        return f"{where}, {token}" if token else where

    def _trace_gradient(self) -> str:
        """Where the gradient is not finite; collective over all ranks."""
        found = trace_gradients(self.forward.chunks)
        return f"not finite in {found}" if found else "every entry is finite, but not the sum of their squares"
