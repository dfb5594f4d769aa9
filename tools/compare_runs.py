"""Draws metrics of two or more runs over each other and prints their numbers side by side.

python tools/compare_runs.py RUN RUN ... [--metrics KEY ...] [--output plot.png] [--last 5]

A metric with an interval (`KEY_low`, `KEY_high`) is drawn with it as a band. Runs may differ in length and metrics, and
may still be going on.
"""

import argparse
import difflib
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_fipo.config.base import ConfigError
from megatron_fipo.display.readings import number
from megatron_fipo.display.run_files import RunFiles
from megatron_fipo.runtime.exit_codes import BAD_INPUT, DONE

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402

DEFAULT_METRICS = (
    "eval/accuracy",
    "eval/greedy_accuracy",
    "rollout/reward_mean",
    "rollout/response_length_mean",
    "train/entropy",
    "fipo/influence_weight_mean",
)
# Metrics without a better direction have no best value.
_HIGHER_IS_BETTER = ("eval/", "rollout/reward_mean", "rollout/score_mean", "rollout/accuracy", "perf/")
_LOWER_IS_BETTER = ("time/", "eval/truncated", "perf/peak_memory")

Points = list[tuple[int, float]]


def main(words: Sequence[str] | None = None) -> int:
    """Compare; returns the exit status."""
    arguments = _parser().parse_args(words)
    try:
        runs = {name: RunFiles(path) for name, path in _names(arguments.runs).items()}
        metrics = _choose_metrics(runs, arguments.metrics)
        if arguments.output is not None:
            draw(runs, metrics, arguments.output)
    except ConfigError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return BAD_INPUT
    console, table = Console(highlight=False), numbers(runs, metrics, arguments.last)
    # Names are not cut on a narrow terminal or in a pipe: they are what is compared.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=500)).maximum)
    console.print(table)
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--metrics", nargs="+", metavar="KEY", help="keys of metrics.jsonl")
    parser.add_argument("--output", type=Path, metavar="PLOT.png", help="where to draw; nothing is drawn without it")
    parser.add_argument("--last", type=_positive, default=5, metavar="K", help="the mean is over so many last values")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """Runs by the end of their path, as long as it takes to tell them apart."""
    whole = [path.absolute() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path in whole if whole.count(path) > 1)
        raise ConfigError("RUN", twice, "is given twice", "name every run once")
    longest = max(len(path.parts) for path in whole)
    for size in range(1, longest + 1):
        names = [os.sep.join(path.parts[-size:]) for path in whole]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, paths, strict=True))


def _choose_metrics(runs: dict[str, RunFiles], wanted: Sequence[str] | None) -> list[str]:
    known = sorted({key for run in runs.values() for line in run.steps.values() for key in line if key != "step"})
    for metric in wanted or ():
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=4, cutoff=0.4)
            way_out = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known[:8])} and others"
            raise ConfigError("--metrics", metric, "no run has this metric", way_out)
    chosen = list(wanted or (metric for metric in DEFAULT_METRICS if metric in known))
    if not chosen:
        raise ConfigError("RUN", ", ".join(runs), "the runs have written no metrics yet", "wait for their first steps")
    return chosen


def points(run: RunFiles, metric: str) -> Points:
    """A metric's values by step; steps without it, or where it is no finite number, are left out."""
    found = [(step, number(line, metric)) for step, line in sorted(run.steps.items())]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def numbers(runs: dict[str, RunFiles], metrics: Sequence[str], last: int) -> Table:
    """Every metric of every run: first, best and last value, and the mean of the last ones."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for title in ("steps", "start", "best", "at step", "last", f"mean of last {last}"):
        table.add_column(title, justify="right", no_wrap=True)
    for metric in metrics:
        table.add_row(Text(metric, style="bold"))
        for name, run in runs.items():
            cells = _cells(metric, points(run, metric), last)
            table.add_row(f"  {name}", str(max(run.steps, default=0)), *cells)
    return table


def _cells(metric: str, values: Points, last: int) -> list[str]:
    if not values:
        return ["–"] * 5
    best = _best(metric, values)
    mean = statistics.mean(value for _, value in values[-last:])
    at_best = ["–", "–"] if best is None else [f"{best[1]:.4g}", str(best[0])]
    return [f"{values[0][1]:.4g}", *at_best, f"{values[-1][1]:.4g}", f"{mean:.4g}"]


def _best(metric: str, values: Points) -> tuple[int, float] | None:
    if metric.startswith(_LOWER_IS_BETTER):
        return min(values, key=lambda point: point[1])
    return max(values, key=lambda point: point[1]) if metric.startswith(_HIGHER_IS_BETTER) else None


def draw(runs: dict[str, RunFiles], metrics: Sequence[str], output: Path) -> None:
    """Draw every metric in a panel of its own, all runs in it.

    Raises:
        ConfigError: The file cannot be written.
    """
    columns = min(len(metrics), 2)
    rows = math.ceil(len(metrics) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6 * columns, 3.2 * rows), squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place < len(metrics):
            _draw_metric(axis, runs, metrics[place])
        else:
            axis.set_visible(False)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="upper center", ncols=min(len(runs), 4), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / rows * math.ceil(len(runs) / 4) / 3.2))
    try:
        figure.savefig(output, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError("--output", output, f"cannot be written ({error})", "name a .png file") from error
    finally:
        pyplot.close(figure)


def _draw_metric(axis: Axes, runs: dict[str, RunFiles], metric: str) -> None:
    for name, run in runs.items():
        values = points(run, metric)
        steps = [step for step, _ in values]
        (line,) = axis.plot(steps, [value for _, value in values], marker=".", markersize=4, label=name)
        low, high = (dict(points(run, f"{metric}_{end}")) for end in ("low", "high"))
        within = [step for step in steps if step in low and step in high]
        if within:
            bounds = ([each[step] for step in within] for each in (low, high))
            axis.fill_between(within, *bounds, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set_title(metric, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
