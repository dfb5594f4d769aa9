"""What becomes of an update whose numbers are wrong, and of a run that collapses.

Ranks decide alike and without asking each other, since they decide on reduced numbers that all of them have.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.non_finite import has_non_finite_weight, trace_weights
from megatron_fipo.actor.train_step import TrainStep, UpdateResult
from megatron_fipo.config.run import RunConfig
from megatron_fipo.runtime.errors import NonFiniteError, RunError, SafeguardError
from megatron_fipo.trainer.collapse import CollapseWatch
from megatron_fipo.trainer.dumps import Dumps, Fault, Place
from megatron_fipo.types import TrainBatch

logger = logging.getLogger(__name__)

# Faults by name, with the metric that counts the updates that had them.
_COUNTED = {
    "non-finite": "train/faults_non_finite",
    "exploding ratio": "train/faults_exploding_ratio",
    "null noise": "train/faults_null_noise",
}


def null_future_kl_std(metrics: Mapping[str, float]) -> float | None:
    """std(F) of an update's tokens; None where its algorithm has no Future-KL."""
    if "fipo/future_kl_square_mean" not in metrics:
        return None
    variance = metrics["fipo/future_kl_square_mean"] - metrics["fipo/future_kl_mean"] ** 2
    return float(max(variance, 0.0) ** 0.5)


@dataclass(slots=True)
class _Objections:
    """What is held against an update: why it is not made, and whether the run ends with it."""

    reasons: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    stops: bool = False

    def add(self, kind: str, reason: str, stops: bool) -> None:
        """Add one."""
        self.kinds.append(kind)
        self.reasons.append(reason)
        self.stops |= stops


class Safeguards:
    """Watches the updates of a run, and on rank 0 its rollouts.

    Args:
        config: The run.
        train_step: Takes its updates; None where it has none.
        is_main: Whether this rank writes the log.
    """

    def __init__(self, config: RunConfig, train_step: TrainStep | None, is_main: bool) -> None:
        self.config, self._train_step, self._is_main = config.safeguards, train_step, is_main
        self._dumps = None if train_step is None else Dumps(config, train_step)
        self._collapse = CollapseWatch(self.config)
        self._consecutive_skips = 0
        self._counts: Counter[str] = Counter()

    def update(self, mini_batch: Sequence[MicroBatch], place: Place, batch: TrainBatch | None) -> UpdateResult:
        """Take an optimizer step, unless something speaks against it; collective over all ranks.

        Args:
            mini_batch: This rank's micro-batches.
            place: Where the run stands.
            batch: The whole rollout batch, on rank 0.

        Raises:
            NonFiniteError: A loss, a gradient or a weight is not finite, and that ends the run.
            SafeguardError: Another fault ends it. Both are raised on every rank; the update was not applied, unless it
                is said to have damaged the weights.
        """
        assert self._train_step is not None and self._dumps is not None, "there is something to train"
        is_asked_for = (place.step, place.update) == (self.config.dump_step, self.config.dump_update)
        is_begun = is_asked_for and self._dumps.begin(place.step)
        objections = _Objections()
        result = self._train_step.update(mini_batch, place.policy_version, partial(self._refusal, place, objections))
        if result.is_finite and not objections.reasons:
            if is_begun:
                self._dumps.complete(place, Fault("", ""), result, batch)
            if result.applied:
                self._consecutive_skips = 0
            else:
                self._warn(f"{place} was skipped: {result.skip_reason}")
            self._check_weights(place, result, batch)
        else:
            self._refuse(place, objections, result, batch)
        self._train_step.evidence = None
        return result

    def _refusal(self, place: Place, objections: _Objections, metrics: Mapping[str, float]) -> str:
        """Why a finite update is not made; what is only to be warned of is told."""
        for kind, policy, text in self._faults(place, metrics):
            self._counts[kind] += 1
            if policy == "warn":
                self._warn(f"{place}: {text}")
            else:
                objections.add(kind, text, policy == "stop")
        return "; ".join(objections.reasons)

    def _faults(self, place: Place, metrics: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
        """Kind, policy and text of what a finite update's metrics tell."""
        config = self.config
        largest = metrics.get("train/log_ratio_abs_max", 0.0)
        if largest > config.max_log_ratio:
            text = f"a token's log-ratio is {largest:.3f} (safeguards.max_log_ratio = {config.max_log_ratio:g})"
            yield "exploding ratio", config.on_exploding_ratio, text
        noise = null_future_kl_std(metrics) if place.is_null else None
        if noise is not None and noise > config.null_future_kl_budget:
            text = (
                f"std(F) = {noise:.4g} before the first applied update, where the policy is the old one and F must be "
                f"0 (safeguards.null_future_kl_budget = {config.null_future_kl_budget:g}): log-probabilities of the "
                "update differ from the old ones by numerical noise, and the influence weights with them"
            )
            yield "null noise", config.on_null_noise, text

    def _refuse(self, place: Place, objections: _Objections, result: UpdateResult, batch: TrainBatch | None) -> None:
        """Keep an update that was not made, and end the run or go on without it."""
        assert self._train_step is not None and self._dumps is not None, "an update has been computed"
        kind, reason, stops = ", ".join(objections.kinds), result.skip_reason, objections.stops
        error: type[RunError] = SafeguardError
        if not result.is_finite:
            self._counts["non-finite"] += 1
            weights = trace_weights(self._train_step.forward.chunks)
            kind, error, stops = "non-finite", NonFiniteError, self.config.on_non_finite == "stop" or bool(weights)
            if weights:
                reason += f". The weights were not finite before it: {weights}"
        self._consecutive_skips += 1
        kept = self._dumps.write(place, Fault(kind, reason), result, batch)
        text = f"{place}: {reason}; the update was not applied{kept}"
        if stops:
            raise error(text)
        if self._consecutive_skips > self.config.max_consecutive_skips:
            raise error(
                f"{text}. It is faulty update {self._consecutive_skips} in a row, and "
                f"safeguards.max_consecutive_skips = {self.config.max_consecutive_skips}"
            )
        self._warn(text)

    def _check_weights(self, place: Place, result: UpdateResult, batch: TrainBatch | None) -> None:
        """End the run where a rollout's last update has damaged the weights; earlier damage shows in the next loss."""
        assert self._train_step is not None and self._dumps is not None, "an update has been computed"
        chunks = self._train_step.forward.chunks
        if place.update < place.num_updates or not has_non_finite_weight(chunks):
            return
        self._counts["non-finite"] += 1
        reason = f"after its optimizer step weights are not finite: {trace_weights(chunks)}"
        kept = self._dumps.write(place, Fault("non-finite", reason, is_after_step=True), result, batch)
        raise NonFiniteError(f"{place}: {reason}{kept}. Go on from a checkpoint")

    def watch_rollout(self, step: int, batch: TrainBatch, rollout_metrics: Mapping[str, float]) -> None:
        """Look whether reward or response length has collapsed; on the rank that has the batch.

        Raises:
            SafeguardError: It has, and that ends the run.
        """
        for text in self._collapse.see(batch, rollout_metrics.get("rollout/truncated_fraction")):
            if self.config.on_collapse == "stop":
                raise SafeguardError(f"step {step}: {text}")
            logger.warning("step %d: %s", step, text)

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the step; counting begins anew."""
        metrics = self._collapse.metrics()
        if self._train_step is not None:
            metrics |= {metric: float(self._counts[kind]) for kind, metric in _COUNTED.items()}
            metrics["train/consecutive_skips"] = float(self._consecutive_skips)
        self._counts.clear()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; those of rank 0 are whole."""
        return {"consecutive_skips": self._consecutive_skips, "collapse": self._collapse.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`, the same on every rank."""
        self._consecutive_skips = int(state["consecutive_skips"])
        self._collapse.load_state_dict(state["collapse"])

    def _warn(self, text: str) -> None:
        if self._is_main:
            logger.warning("%s", text)
