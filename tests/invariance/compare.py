"""How far two outcomes are apart, in the norms of docs/architecture.md, contract 1."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_fipo.actor.train_step import UpdateResult
from megatron_fipo.metrics.catalogue import CATALOGUE
from tests.invariance.updates import Outcome

BOUND = 1e-6
METRIC_BOUND = 1e-5
METRIC_FLOOR = 1e-6
# A gradient tensor whose norm is below this part of the whole gradient's is one whose true gradient is zero, or nearly.
SMALL = 1e-3


@dataclass(frozen=True)
class Deviation:
    """Largest distances over all updates; NaN where something is not a number.

    Attributes:
        loss: |Δ| over the mean |A|.
        grad_norm: Relative.
        metrics: Relative; metrics that count are compared exactly, in `differences`.
        gradients: ‖a − b‖ / ‖b‖ over all tensors and updates; of small tensors ‖a − b‖ / (SMALL · whole norm).
        weights: ‖a − b‖ / max(‖b‖, 1) over all tensors.
        worst_gradient: The tensor where the gradients are farthest apart.
        differences: What must be equal and is not.
    """

    loss: float
    grad_norm: float
    metrics: float
    gradients: float
    weights: float
    worst_gradient: str
    differences: tuple[str, ...] = ()

    @property
    def violations(self) -> list[str]:
        """Which parts of the contract do not hold."""
        limits = {"loss": BOUND, "grad_norm": BOUND, "gradients": BOUND, "weights": BOUND, "metrics": METRIC_BOUND}
        beyond = [name for name, limit in limits.items() if not getattr(self, name) <= limit]
        return [*self.differences, *(f"{name}: {getattr(self, name):.2e} > {limits[name]:.0e}" for name in beyond)]

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{name} {getattr(self, name):.1e}" for name in ("loss", "grad_norm", "metrics", "weights", "gradients")
        )
        return f"{numbers} ({self.worst_gradient})"


def deviation(ranks: Sequence[Outcome], reference: Outcome) -> Deviation:
    """Distance of what the ranks report from the outcome of one process."""
    mine = ranks[0]
    gradients, worst = _gradient_distance(mine, reference)
    pairs = list(zip(mine.results, reference.results, strict=True))
    return Deviation(
        loss=_largest(abs(a.loss - b.loss) / reference.mean_advantage for a, b in pairs),
        grad_norm=_largest(abs(a.grad_norm / b.grad_norm - 1) for a, b in pairs),
        metrics=_largest(_metric_distances(pairs)),
        gradients=gradients,
        weights=_largest(
            _norm(mine.weights[name] - weight) / max(_norm(weight), 1.0) for name, weight in reference.weights.items()
        ),
        worst_gradient=worst,
        differences=(*_disagreements(ranks), *_differences(mine, reference)),
    )


def _disagreements(ranks: Sequence[Outcome]) -> Iterator[str]:
    for rank, outcome in enumerate(ranks):
        if outcome.results != ranks[0].results:
            yield f"rank {rank} reports other numbers than rank 0"
        if outcome.digest != ranks[0].digest:
            yield f"rank {rank} holds other weights than rank 0"


def _largest(values: Iterable[float]) -> float:
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def _gradient_distance(mine: Outcome, reference: Outcome) -> tuple[float, str]:
    distances = {}
    for number, (actual, expected) in enumerate(zip(mine.gradients, reference.gradients, strict=True), start=1):
        whole = math.sqrt(sum(float(_norm(gradient)) ** 2 for gradient in expected.values()))
        for name, gradient in expected.items():
            distance = _norm(actual[name].double() - gradient.double()) / max(_norm(gradient), SMALL * whole)
            distances[f"{name}, update {number}"] = distance
    worst = max(distances, key=lambda name: math.inf if math.isnan(distances[name]) else distances[name])
    return distances[worst], worst


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _metric_distances(pairs: Sequence[tuple[UpdateResult, UpdateResult]]) -> Iterator[float]:
    for mine, reference in pairs:
        for name, value in reference.metrics.items():
            if name in mine.metrics and CATALOGUE.find(name)[0].reduction != "sum":
                yield abs(mine.metrics[name] - value) / max(abs(value), METRIC_FLOOR / METRIC_BOUND)


def _differences(mine: Outcome, reference: Outcome) -> Iterator[str]:
    if mine.weights.keys() != reference.weights.keys():
        yield "the exports hold other tensors"
    for number, (actual, expected) in enumerate(zip(mine.results, reference.results, strict=True), start=1):
        for field in ("applied", "skip_reason", "denominator", "learning_rate"):
            if getattr(actual, field) != getattr(expected, field):
                yield f"update {number}: {field} {getattr(actual, field)} instead of {getattr(expected, field)}"
        gradient_norm = math.sqrt(sum(_norm(gradient) ** 2 for gradient in mine.gradients[number - 1].values()))
        if not abs(gradient_norm / actual.grad_norm - 1) <= METRIC_BOUND:
            yield f"update {number}: the gradients' norm is {gradient_norm}, reported as {actual.grad_norm}"
        if actual.metrics.keys() != expected.metrics.keys():
            yield f"update {number}: other metrics"
        for name, value in expected.metrics.items():
            if CATALOGUE.find(name)[0].reduction == "sum" and actual.metrics.get(name, np.nan) != value:
                yield f"update {number}: {name} = {actual.metrics.get(name)} instead of {value}"
