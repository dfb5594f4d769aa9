"""Metrics of two ranks added up as if one rank had seen everything, and rendered."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from megatron_fipo.metrics.reduce import reduce_metrics
from megatron_fipo.types import Accumulator, Distribution, Metrics, merge_metrics, render_metrics
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
        "train/ratio": Accumulator.ratio(tensor, tensor.abs(), mask),
        "train/all": Distribution.of(tensor, mask, (250, 500, 999)),
        "empty/all": Distribution.of(tensor, NOTHING, (500,)),
        "empty/mean": Accumulator.mean(tensor, NOTHING),
        "empty/max": Accumulator.max(tensor, NOTHING),
        "empty/min": Accumulator.min(tensor, NOTHING),
        "one rank/mean": Accumulator.mean(tensor, mask if values[0] == 1.0 else NOTHING),
    }


RENDERED = {
    "another/mean": 16.0,
    "one rank/mean": 1.5,
    "train/all_p25": 1.0,
    "train/all_p50": 2.0,
    "train/all_p999": 6.0,
    "train/max": 6.0,
    "train/mean": 1.6,
    "train/min": -5.0,
    "train/ratio": 8 / 18,
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
        assert not {"train/all", "empty/all"} & set(results["kinds"]), "quantiles stand under their own names"
        for key, value in metrics_of(*SEEN[0]).items():
            assert isinstance(value, Distribution) or results["kinds"][key] == value.kind
        assert results["collectives"] == 2 + 4, "sums, extremes, and four for all quantiles"
        assert results["nothing"] == {}
        assert math.isnan(results["nan"]["train/sum"])


def test_merging_before_the_reduction_gives_the_same():
    assert render_metrics(merge_metrics([metrics_of(*seen) for seen in SEEN])) == pytest.approx(RENDERED)
