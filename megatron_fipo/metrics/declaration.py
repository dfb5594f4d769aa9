"""What it means to declare a metric, and how a logged name finds its declaration."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from megatron_fipo.types import quantile_suffix

Reduction = Literal["mean", "ratio", "sum", "max", "min", "quantile", "rank 0"]
"""How parts of an update's metric, one for each micro-batch and rank, become one number.

"mean" and "ratio" are Σ numerators / Σ denominators over all parts, never a mean of means; "quantile" is the exact
order statistic of all values together; "rank 0" has no parts, since rank 0 knows the whole.
"""

Combination = Literal["mean", "sum", "max", "min", "first", "last", "list", "step"]
"""How the values of a step's updates become the step's value; "step" has one value a step from the start."""

_PLACEHOLDER = re.compile(r"<(\w+)>")


class UndeclaredMetric(KeyError):
    """A metric that the catalogue does not know."""

    def __str__(self) -> str:
        return f"{self.args[0]!r} is not in megatron_fipo/metrics/catalogue.py; add a row there"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, or a family of metrics.

    Attributes:
        name: Key in metrics.jsonl. In a family, each `<word>` stands for any text: `time/<phase>_s`.
        description: What it is, in one line.
        unit: Of its values; "" for a pure number.
        reduction: Over micro-batches and ranks.
        combination: Over a step's updates.
    """

    name: str
    description: str
    unit: str = ""
    reduction: Reduction = "rank 0"
    combination: Combination = "step"

    @property
    def labels(self) -> tuple[str, ...]:
        """Words of a family that stand for any text; none for a single metric."""
        return tuple(_PLACEHOLDER.findall(self.name))

    def match(self, key: str) -> dict[str, str] | None:
        """What the family's words stand for in `key`, or None where the key is another metric."""
        found = self._pattern.fullmatch(key)
        return found.groupdict() if found else None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = _PLACEHOLDER.split(self.name)
        return re.compile(
            "".join(f"(?P<{piece}>.+)" if place % 2 else re.escape(piece) for place, piece in enumerate(pieces)),
            re.DOTALL,
        )


@dataclass(frozen=True, slots=True)
class Section:
    """Metrics that belong together.

    Attributes:
        title: Heading in the documentation.
        text: What they have in common.
        metrics: The metrics.
    """

    title: str
    text: str
    metrics: tuple[Metric, ...]


class Catalogue:
    """All declared metrics.

    Args:
        sections: The metrics, as they are documented.

    Raises:
        ValueError: Two metrics have one name.
    """

    def __init__(self, sections: Iterable[Section]) -> None:
        self.sections = tuple(sections)
        rows = [metric for section in self.sections for metric in section.metrics]
        names = [metric.name for metric in rows]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"declared twice: {', '.join(sorted(twice))}")
        self._single = {metric.name: metric for metric in rows if not metric.labels}
        # The most specific family first: the one with the most text of its own.
        self._families = sorted(
            (metric for metric in rows if metric.labels), key=lambda metric: -len(_PLACEHOLDER.sub("", metric.name))
        )

    def find(self, key: str) -> tuple[Metric, dict[str, str]]:
        """Declaration of a logged name, and what the words of its family stand for.

        Raises:
            UndeclaredMetric: There is none.
        """
        if key in self._single:
            return self._single[key], {}
        for metric in self._families:
            labels = metric.match(key)
            if labels is not None:
                return metric, labels
        raise UndeclaredMetric(key)

    def undeclared(self, keys: Iterable[str]) -> list[str]:
        """Names without a declaration, sorted."""
        return sorted(key for key in keys if not self._knows(key))

    def _knows(self, key: str) -> bool:
        try:
            self.find(key)
        except UndeclaredMetric:
            return False
        return True

    def combine(self, updates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A step's metrics from those of its updates, as each metric's declaration says.

        An update that lacks a metric takes no part in it.

        Args:
            updates: Metrics of every update, in order.

        Raises:
            UndeclaredMetric: A metric is not in the catalogue.
        """
        combined: dict[str, Any] = {}
        for key in sorted({key for update in updates for key in update}):
            values = [update[key] for update in updates if key in update]
            combined[key] = _combine(self.find(key)[0], values)
        return combined


def _combine(metric: Metric, values: Sequence[Any]) -> Any:
    match metric.combination:
        case "mean":
            return sum(values) / len(values)
        case "sum":
            return sum(values)
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "first":
            return values[0]
        case "last":
            return values[-1]
        case "list":
            return list(values)
        case "step":
            raise ValueError(f"{metric.name}: is declared as one value a step, and an update reports it")


def quantiles(name: str, of: str, levels: Sequence[int], unit: str = "") -> tuple[Metric, ...]:
    """Rows of the quantiles `<name>_p…` of an update's values.

    The step's value of a tail (1 % or 99 % and beyond) is the worst of its updates'; of other quantiles it is the
    last update's, where the policy is farthest from the old one.

    Args:
        name: Metric that they are quantiles of.
        of: What the values are, to end "99 % quantile of …".
        levels: In thousandths.
        unit: Of the values.
    """
    return tuple(
        Metric(
            name=f"{name}_{quantile_suffix(level)}",
            description=f"{'Median' if level == 500 else f'{level / 10:g} % quantile'} of {of}.",
            unit=unit,
            reduction="quantile",
            combination="min" if level <= 10 else "max" if level >= 990 else "last",
        )
        for level in levels
    )
