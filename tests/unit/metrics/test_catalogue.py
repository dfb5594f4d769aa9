"""Declarations are found by name, say how values combine, and are documented."""

import re
from pathlib import Path

import pytest

from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.declaration import Catalogue, Metric, Section, UndeclaredMetric, quantiles
from tests.tool_modules import load_tool

ROOT = Path(__file__).parents[3]
METRICS = [metric for section in CATALOGUE.sections for metric in section.metrics]


def catalogue(*metrics: Metric) -> Catalogue:
    return Catalogue([Section("All", "", metrics)])


def test_the_documentation_is_fresh() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert text == load_tool("generate_metric_docs").page(), "run `python tools/generate_metric_docs.py`"


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_declaration_is_in_order(metric: Metric) -> None:
    assert re.fullmatch(
        r"(step|policy_version|(rollout|reward|train|fipo|eval|data|perf|time)/[a-z0-9_/<>]+)", metric.name
    )
    assert metric.description.endswith(".") and "\n" not in metric.description
    assert CATALOGUE.find(re.sub(r"<\w+>", "some", metric.name))[0] is metric
    if metric.combination == "step":
        assert metric.reduction in ("rank 0", "max", "min", "sum"), "values of updates say how they combine"


def test_a_family_gives_its_words() -> None:
    metric, labels = CATALOGUE.find("rollout/math/algebra 1/reward_mean")
    assert (metric.name, labels) == ("rollout/<source>/reward_mean", {"source": "math/algebra 1"})
    assert CATALOGUE.find("rollout/reward_mean")[0].labels == ()
    assert CATALOGUE.find("time/old_log_probs_s")[1] == {"phase": "old_log_probs"}


def test_the_more_specific_family_wins() -> None:
    both = catalogue(Metric(name="x/<any>", description="."), Metric(name="x/<source>/length", description="."))
    assert both.find("x/a/length")[0].name == "x/<source>/length"
    assert both.find("x/a/width")[0].name == "x/<any>"


def test_what_is_not_declared_is_named() -> None:
    with pytest.raises(UndeclaredMetric, match="'train/typo' is not in .*catalogue.py"):
        CATALOGUE.find("train/typo")
    with pytest.raises(UndeclaredMetric):
        CATALOGUE.combine([{"train/typo_max": 1.0}])
    assert CATALOGUE.undeclared(["train/typo", "train/loss", "rollout/x", "time/a_s"]) == ["rollout/x", "train/typo"]


def test_a_name_is_declared_once() -> None:
    with pytest.raises(ValueError, match="declared twice: a"):
        catalogue(Metric(name="a", description="."), Metric(name="a", description="."))


def test_values_combine_as_declared_whatever_they_are_called() -> None:
    kinds = ("mean", "sum", "max", "min", "first", "last", "list")
    # Names say the opposite of what is declared: `pos_mini_frac` is a mean, though "min" is in it.
    names = ("pos_mini_frac", "loss_max", "total_min", "mean_max", "last", "first", "sum")
    rows = [Metric(name=name, description=".", combination=kind) for name, kind in zip(names, kinds, strict=True)]
    updates = [dict.fromkeys(names, 3.0), {}, dict.fromkeys(names, 1.0), dict.fromkeys(names, 2.0)]
    combined = catalogue(*rows).combine(updates)
    expected = (2.0, 6.0, 3.0, 1.0, 3.0, 2.0, [3.0, 1.0, 2.0])
    assert combined == dict(zip(names, expected, strict=True))


def test_an_update_cannot_report_what_a_step_has_once() -> None:
    with pytest.raises(ValueError, match="one value a step"):
        catalogue(Metric(name="a", description=".")).combine([{"a": 1.0}])


def test_tails_of_quantiles_keep_the_worst_update() -> None:
    rows = quantiles("r", "r", (1, 10, 250, 500, 750, 990, 999))
    assert [row.name for row in rows] == ["r_p001", "r_p01", "r_p25", "r_p50", "r_p75", "r_p99", "r_p999"]
    assert [row.combination for row in rows] == ["min", "min", "last", "last", "last", "max", "max"]
    assert (rows[0].description, rows[3].description) == ("0.1 % quantile of r.", "Median of r.")
