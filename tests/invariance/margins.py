"""How far the decisions of a run lie from their thresholds: rounding must not be able to flip one."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_fipo.actor import train_step
from megatron_fipo.actor.train_step import UpdateResult
from megatron_fipo.algorithms.policy_loss import LossInputs, LossOutput
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import GspoConfig
from tests.invariance.grid import Combination
from tests.invariance.updates import ALGORITHMS, Outcome, run_combinations

RATIO_MARGIN = 1e-4
"""Least distance of a log-ratio from the logarithm of a bound."""
WEIGHT_MARGIN = 1e-5
"""Least distance of a Future-KL from the logarithm of a bound of the influence weight, or of 1, unless it is 0."""
ROUTER_MARGIN = 1e-3
"""Least distance of the score of the last expert that is chosen from the first that is not, for every token."""


@dataclass
class Margins:
    """Smallest distances seen in a run, by what decides."""

    smallest: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, distances: Tensor) -> None:
        if distances.numel():
            self.smallest[name] = min(self.smallest.get(name, math.inf), float(distances.detach().min()))

    def faults(self) -> list[str]:
        """Decisions that rounding could flip."""
        limits = {"ratio": RATIO_MARGIN, "weight": WEIGHT_MARGIN, "router": ROUTER_MARGIN}
        return [
            f"{name}: {distance:.1e} < {limits[name.split()[0]]:.0e}"
            for name, distance in self.smallest.items()
            if distance < limits[name.split()[0]]
        ]


def blind_spots(results: Sequence[UpdateResult], config: AlgorithmConfig) -> list[str]:
    """Rules of the algorithm that the updates of one process never exercise."""
    first, later = results[0].metrics, [result.metrics for result in results[1:]]
    wanted = {
        "a clip from below": any(metrics["train/clip_fraction_low"] > 0 for metrics in later),
        "a clip from above": any(metrics["train/clip_fraction_high"] > 0 for metrics in later),
        "a dual clip": any(metrics["fipo/dual_clip_fraction"] > 0 for metrics in later),
        "an unmoved policy": first["train/ratio_max"] == 1.0,
    }
    if isinstance(config, FipoConfig):
        wanted |= {
            "moved weights": all(metrics["fipo/fraction_changed"] >= 0.2 for metrics in later),
            "a weight at its lower bound": any(metrics["fipo/fraction_at_lower_bound"] > 0 for metrics in later),
            "a weight at its upper bound": any(metrics["fipo/fraction_at_upper_bound"] > 0 for metrics in later),
            "a dropped sequence": any(metrics["fipo/dropped_sequences"] > 0 for metrics in later),
            "a kept sequence": all(result.denominator > 0 for result in results),
        }
    return [f"no update has {what}" for what, holds in wanted.items() if not holds]


def run_watched(root: Path, combinations: Sequence[Combination]) -> list[tuple[Outcome, list[str]]]:
    """Run combinations in one process; with each outcome, what makes it unfit to compare others with."""
    found = []
    for combination in combinations:
        with recorded_margins() as margins:
            (outcome,) = run_combinations(root, [combination])
        faults = margins.faults() + blind_spots(outcome.results, ALGORITHMS[combination.algorithm])
        found.append((outcome, faults))
    return found


@contextmanager
def recorded_margins() -> Iterator[Margins]:
    """Watch the losses and routers of this process, which must hold the whole batch."""
    margins = Margins()
    policy_loss, gating = train_step.policy_loss, TopKRouter.gating

    def watched_loss(inputs: LossInputs, config: AlgorithmConfig, *args: Any, **kwargs: Any) -> LossOutput:
        output = policy_loss(inputs, config, *args, **kwargs)
        _note_ratios(margins, inputs, config)
        if isinstance(config, FipoConfig):
            _note_weights(margins, inputs, output, config)
        return output

    def watched_gating(router: Any, hidden: Tensor) -> Tensor:
        scores = gating(router, hidden)
        ordered = scores.detach().sort(dim=-1, descending=True).values
        margins.note("router gap", ordered[..., router.topk - 1] - ordered[..., router.topk])
        return scores

    train_step.policy_loss, TopKRouter.gating = watched_loss, watched_gating
    try:
        yield margins
    finally:
        train_step.policy_loss, TopKRouter.gating = policy_loss, gating


def _note_ratios(margins: Margins, inputs: LossInputs, config: AlgorithmConfig) -> None:
    assert config.dual_clip is not None
    log_ratio = (inputs.log_probs.detach() - inputs.old_log_probs)[inputs.response_mask]
    if isinstance(config, GspoConfig):
        lengths = inputs.response_lengths
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        log_ratio = torch.zeros(len(lengths), dtype=log_ratio.dtype).index_add(0, numbers, log_ratio) / lengths
        log_ratio = log_ratio[lengths > 0]
    bounds = {
        "clip low": 1 - config.clip_low,
        "clip high": 1 + config.clip_high,
        "dual clip": config.dual_clip,
    }
    if isinstance(config, FipoConfig):
        bounds["safety"] = config.safety_threshold
    for name, bound in bounds.items():
        margins.note(f"ratio at {name}", (log_ratio - math.log(bound)).abs())


def _note_weights(margins: Margins, inputs: LossInputs, output: LossOutput, config: FipoConfig) -> None:
    future_kl = output.future_kl[inputs.response_mask].double()
    for name, bound in (("lower", config.influence_clip_low), ("upper", config.influence_clip_high), ("middle", 1.0)):
        distances = (future_kl - math.log(bound)).abs()
        margins.note(f"weight at {name} bound", distances[future_kl != 0] if bound == 1.0 else distances)
