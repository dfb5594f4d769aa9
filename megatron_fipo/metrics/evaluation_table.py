"""An evaluation's metrics as a table: one row for each source, one column for each estimate."""

import re
from collections.abc import Mapping, Sequence

_SOURCE = re.compile(r"eval/(.+)/num_problems")
_ESTIMATE = re.compile(r"(avg|cons|pass)_at_(\d+)")
_ORDER = ("avg", "cons", "pass")


def evaluation_table(metrics: Mapping[str, float]) -> list[str]:
    """Lines of the table, the column titles first.

    Args:
        metrics: See `trainer.evaluation.results.evaluation_metrics`; other metrics do not matter.

    Returns:
        Lines; a mean is followed by its interval. The last row is of all problems together where there are several
        sources.
    """
    sources = [match[1] for match in map(_SOURCE.fullmatch, metrics) if match]
    estimates = sorted(
        {
            (_ORDER.index(match[1]), int(match[2]))
            for source in sources
            for name in metrics
            if name.startswith(f"eval/{source}/") and (match := _ESTIMATE.fullmatch(name.rpartition("/")[2]))
        }
    )
    rows = [["source", "problems", *(f"{_ORDER[kind]}@{k}" for kind, k in estimates), "greedy", "tokens", "cut off"]]
    for source in sources:
        names = [f"{_ORDER[kind]}_at_{k}" for kind, k in estimates]
        rows.append(_row(metrics, source, f"eval/{source}", names))
    if len(sources) != 1:
        names = ["accuracy" if _ORDER[kind] == "avg" else "" for kind, _ in estimates]
        rows.append(_row(metrics, "all", "eval", names))
    return _aligned(rows)


def _row(metrics: Mapping[str, float], title: str, prefix: str, names: Sequence[str]) -> list[str]:
    return [
        title,
        f"{metrics[f'{prefix}/num_problems']:.0f}",
        *(_with_interval(metrics, f"{prefix}/{name}") for name in names),
        _with_interval(metrics, f"{prefix}/greedy_accuracy"),
        f"{metrics[f'{prefix}/response_length_mean']:.1f}",
        f"{metrics[f'{prefix}/truncated_fraction']:.1%}",
    ]


def _with_interval(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    return f"{metrics[name]:.3f} ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
