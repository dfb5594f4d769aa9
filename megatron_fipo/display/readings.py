"""Which metrics a reader sees first, under which short names, and how numbers are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Reading:
    """A metric, or two that belong together, as a reader sees it.

    Attributes:
        label: Short name.
        keys: Keys of metrics.jsonl; shown joined by a slash.
        form: Format of each number.
    """

    label: str
    keys: tuple[str, ...]
    form: str

    def show(self, metrics: Mapping[str, Any]) -> str | None:
        """The numbers as text, or None where the metrics have none of them."""
        values = [number(metrics, key) for key in self.keys]
        if all(value is None for value in values):
            return None
        return " / ".join("–" if value is None else format(value, self.form) for value in values)


def number(metrics: Mapping[str, Any], key: str) -> float | None:
    """The metric, or None where it is missing, null or no number."""
    value = metrics.get(key)
    return value if isinstance(value, int | float) else None


READINGS = (
    Reading("reward", ("rollout/reward_mean",), ".3f"),
    Reading("length", ("rollout/response_length_mean",), ".1f"),
    Reading("entropy", ("train/entropy",), ".3f"),
    Reading("loss", ("train/loss",), "+.4f"),
    Reading("grad norm", ("train/grad_norm",), ".3f"),
    Reading("policy KL", ("train/policy_kl",), "+.1e"),
    Reading("clipped low/high", ("train/clip_fraction_low", "train/clip_fraction_high"), ".2%"),
    Reading("influence", ("fipo/influence_weight_mean",), ".4f"),
    Reading("influence min/max", ("fipo/influence_weight_min", "fipo/influence_weight_max"), ".3f"),
    Reading("dropped", ("fipo/dropped_sequences",), ".0f"),
    Reading("memory GiB", ("perf/peak_memory_gib",), ".2f"),
)


def accuracy(metrics: Mapping[str, Any]) -> str | None:
    """The evaluation among a step's metrics as text, or None where there was none."""
    value = number(metrics, "eval/accuracy")
    if value is None:
        return None
    low, high = number(metrics, "eval/accuracy_low"), number(metrics, "eval/accuracy_high")
    interval = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    greedy = number(metrics, "eval/greedy_accuracy")
    return f"{value:.3f}{interval}" + ("" if greedy is None else f", greedy {greedy:.3f}")


def speeds(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per second by phase."""
    end = "_tokens_per_s"
    return {
        key.removeprefix("perf/").removesuffix(end).removesuffix("_response"): float(value)
        for key in metrics
        if key.startswith("perf/") and key.endswith(end) and (value := number(metrics, key)) is not None
    }


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The last finite values as a row of bars from their smallest to their largest."""
    finite = [value for value in values if math.isfinite(value)]
    shown = finite[-width:] if width > 0 else []
    if not shown:
        return ""
    marks = "_.-=+*#@" if ascii_only else BARS
    low, span = min(shown), max(shown) - min(shown)
    return "".join(marks[round((value - low) / span * (len(marks) - 1)) if span else 0] for value in shown)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds as 0:00:00, without the hours where there are none."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def quantity(value: float) -> str:
    """A count in three digits: 950, 12.3k, 4.56M."""
    for limit, divisor, unit in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if abs(value) < limit:
            return f"{value / divisor:.3g}{unit}"
    return f"{value / 1e9:.3g}G"
