"""Metrics of two ranks added up as if one rank had seen everything, and rendered."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from megatron_fipo.metrics.reduce import reduce_metrics, render_metrics
from megatron_fipo.types import Accumulator, Metrics, merge_metrics
from tests.distributed_helpers import run_distributed

# What each of two ranks saw: values, and which of them count.
SEEN = [
    ([1.0, 2.0, 9.0], [True, True, False]),
    ([-5.0, 4.0, 6.0], [True, True, True]),
]
NOTHING = torch.zeros(3, dtype=torch.bool)


def metrics_of(values: list[float], counts: list[bool]) -> Metrics:
    tensor, mask = torch.tensor(values), torch.tensor(counts)
    return {
        "train/mean": Accumulator.mean(tensor, mask),
        "train/sum": Accumulator.sum(tensor),
        "train/max": Accumulator.max(tensor, mask),
        "train/min": Accumulator.min(tensor, mask),
        "another/mean": Accumulator.mean(tensor * 10, mask),
        "empty/mean": Accumulator.mean(tensor, NOTHING),
        "empty/max": Accumulator.max(tensor, NOTHING),
        "empty/min": Accumulator.min(tensor, NOTHING),
        "one rank/mean": Accumulator.mean(tensor, mask if values[0] == 1.0 else NOTHING),
    }


RENDERED = {
    "another/mean": 16.0,
    "one rank/mean": 1.5,
    "train/max": 6.0,
    "train/mean": 1.6,
    "train/min": -5.0,
    "train/sum": 17.0,
}


def reduced_on_a_rank() -> dict:
    group = dist.group.WORLD
    with CommDebugMode() as communication:
        reduced = reduce_metrics(metrics_of(*SEEN[dist.get_rank()]), group)
    nan = {"train/sum": Accumulator.sum(torch.tensor(math.nan if dist.get_rank() else 1.0))}
    return {
        "rendered": render_metrics(reduced),
        "kinds": {key: value.kind for key, value in reduced.items()},
        "collectives": communication.get_total_counts(),
        "nothing": reduce_metrics({}, group),
        "nan": render_metrics(reduce_metrics(nan, group)),
    }


@pytest.mark.distributed
def test_ranks_agree_with_one_that_saw_everything():
    for results in run_distributed(reduced_on_a_rank, 2):
        assert results["rendered"] == pytest.approx(RENDERED)
        assert results["kinds"] == {key: value.kind for key, value in metrics_of(*SEEN[0]).items()}
        assert results["collectives"] == 4, "one for each kind"
        assert results["nothing"] == {}
        assert math.isnan(results["nan"]["train/sum"])


def test_merging_before_the_reduction_gives_the_same():
    assert render_metrics(merge_metrics([metrics_of(*seen) for seen in SEEN])) == pytest.approx(RENDERED)


def test_rendering_by_hand():
    def value(kind: str, total: float, count: float) -> Accumulator:
        return Accumulator(kind, torch.tensor(total).double(), torch.tensor(count).double())

    metrics = {
        "b": value("mean", 3.0, 4.0),
        "a": value("sum", 0.0, 1.0),
        "infinite sum": value("sum", math.inf, 1.0),
        "no mean": value("mean", 0.0, 0.0),
        "no maximum": value("max", -math.inf, 1.0),
        "no minimum": value("min", math.inf, 1.0),
        "maximum": value("max", -2.0, 1.0),
        "overflow": value("max", math.inf, 1.0),
    }
    rendered = render_metrics(metrics)
    assert rendered == {"a": 0.0, "b": 0.75, "infinite sum": math.inf, "maximum": -2.0, "overflow": math.inf}
    assert list(rendered) == sorted(rendered)
    assert all(type(number) is float for number in rendered.values())
    assert render_metrics({}) == {}
