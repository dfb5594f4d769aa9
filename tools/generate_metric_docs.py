"""Writes docs/metrics.md from the catalogue of metrics: `python tools/generate_metric_docs.py`."""

from pathlib import Path

from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.declaration import Metric, Section

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
INTRODUCTION = """\
# Metrics

<!-- Written by tools/generate_metric_docs.py from megatron_fipo/metrics/catalogue.py. -->

A run writes one JSON object a step to `metrics.jsonl` in its run directory, and to the other sinks that
`metrics.tensorboard`, `metrics.wandb` and `metrics.prometheus_port` ask for. A metric without a value in a step (a mean
over nothing, say) is left out; a number that is not finite is written as `null`. A sink that fails is reported once and
never stops the run; metrics.jsonl is part of the run, which stops where it cannot be written.

**Over ranks** says how the parts of an update's metric, one for each micro-batch and rank, become one number. `mean`
and `ratio` are the sum of all numerators over the sum of all denominators, never a mean of means. `quantile` is exact:
the q-quantile of n values is the ⌈q·n⌉-th smallest of all of them (nearest rank), as float32, and the same bits however
the values are cut. `rank 0` has no parts. **Over updates** says how the values of a step's updates become the step's;
`step` has one value a step. An update that lacks a metric takes no part in it.

Quantiles cost four small all-reduces an update: some 4 ms of processor time on the quickstart's 4 CPU ranks, which is
5 % of its 70 ms updates and little beside those of a larger model. `metrics.quantiles: false` leaves them out.

In a name, `<word>` stands for any text; Prometheus has it as a label. A request to its endpoint needs the header
`Authorization: Bearer TOKEN` (`credentials_file: RUN/prometheus_token` in a scrape configuration).
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(_section(section) for section in CATALOGUE.sections)])


def _section(section: Section) -> str:
    rows = [f"## {section.title}", "", section.text, "", "| Metric | What | Unit | Over ranks | Over updates |"]
    return "\n".join([*rows, "|---|---|---|---|---|", *(_row(metric) for metric in section.metrics), ""])


def _row(metric: Metric) -> str:
    cells = [f"`{metric.name}`", metric.description, metric.unit, metric.reduction, metric.combination]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
