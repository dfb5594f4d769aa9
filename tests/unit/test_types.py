"""Accumulators merge the same in any order and grouping; the losses need torch alone."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.types import (
    Accumulator,
    Distribution,
    Metrics,
    RolloutGroup,
    Sample,
    merge_metrics,
    quantile_suffix,
    render_metrics,
)

KINDS = ["mean", "sum", "max", "min"]

# Whole numbers, whose sums are exact in float64, so that the laws hold bit by bit.
whole_numbers = st.integers(-1000, 1000).map(float)
batches = st.lists(st.tuples(whole_numbers, st.booleans()), max_size=6)


def accumulator(kind: str, batch: list[tuple[float, bool]]) -> Accumulator:
    values = torch.tensor([value for value, _ in batch])
    mask = torch.tensor([counts for _, counts in batch], dtype=torch.bool)
    return Accumulator.sum(values) if kind == "sum" else getattr(Accumulator, kind)(values, mask)


def plain(value: Accumulator) -> tuple[str, float, float]:
    return value.kind, float(value.total), float(value.count)


@given(st.sampled_from(KINDS), batches, batches, batches)
def test_merging_is_associative_and_commutative(kind, first, second, third):
    one, two, three = (accumulator(kind, batch) for batch in (first, second, third))
    assert plain(one.merge(two)) == plain(two.merge(one))
    assert plain(one.merge(two).merge(three)) == plain(one.merge(two.merge(three)))


@given(st.sampled_from(KINDS), batches, batches)
def test_merging_parts_equals_the_whole(kind, first, second):
    merged = accumulator(kind, first).merge(accumulator(kind, second))
    assert plain(merged) == plain(accumulator(kind, first + second))


@given(st.sampled_from(KINDS), batches)
def test_a_part_in_which_nothing_counts_changes_nothing(kind, batch):
    nothing = accumulator(kind, [(7.0, False)] if kind != "sum" else [])
    assert plain(accumulator(kind, batch).merge(nothing)) == plain(accumulator(kind, batch))


def test_accumulators_by_hand():
    values = torch.tensor([[1.0, 5.0], [-3.0, 100.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    assert plain(Accumulator.mean(values, mask)) == ("mean", 3.0, 3.0)
    assert plain(Accumulator.sum(values)) == ("sum", 103.0, 1.0)
    assert plain(Accumulator.max(values, mask)) == ("max", 5.0, 1.0)
    assert plain(Accumulator.min(values, mask)) == ("min", -3.0, 1.0)


def test_an_extreme_of_nothing_is_infinite():
    nothing = torch.zeros(2, dtype=torch.bool)
    assert plain(Accumulator.max(torch.ones(2), nothing)) == ("max", float("-inf"), 1.0)
    assert plain(Accumulator.min(torch.ones(2), nothing)) == ("min", float("inf"), 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_survives_merging(kind):
    good, bad = accumulator(kind, [(1.0, True)]), accumulator(kind, [(float("nan"), True)])
    assert good.merge(bad).total.isnan()
    assert bad.merge(good).total.isnan()


def test_masked_values_are_never_read():
    values, mask = torch.tensor([2.0, float("nan")]), torch.tensor([True, False])
    assert plain(Accumulator.mean(values, mask)) == ("mean", 2.0, 1.0)
    assert plain(Accumulator.max(values, mask)) == ("max", 2.0, 1.0)
    assert plain(Accumulator.min(values, mask)) == ("min", 2.0, 1.0)


def test_low_precision_values_are_added_in_float64():
    values = torch.full((4096,), 1.0 + 2.0**-7, dtype=torch.bfloat16)
    total = Accumulator.mean(values, torch.ones(4096, dtype=torch.bool)).total
    assert total.dtype == torch.float64
    assert float(total) == 4096 * (1.0 + 2.0**-7)


def test_different_kinds_do_not_merge():
    with pytest.raises(ValueError, match="kind = sum: cannot merge into mean"):
        accumulator("mean", []).merge(accumulator("sum", []))


def test_metrics_merge_key_by_key():
    one: Metrics = {"a": accumulator("sum", [(1.0, True)]), "b": accumulator("max", [(2.0, True)])}
    two: Metrics = {"a": accumulator("sum", [(10.0, True)]), "c": accumulator("min", [(3.0, True)])}
    merged = merge_metrics([one, two])
    assert {key: float(value.total) for key, value in merged.items()} == {"a": 11.0, "b": 2.0, "c": 3.0}
    assert merge_metrics([]) == {}


@pytest.mark.parametrize(
    ("rewards", "expected"), [([], False), ([1.0], False), ([0.5, 0.5], False), ([0.0, 1.0], True)]
)
def test_a_group_has_a_signal_when_its_rewards_differ(rewards, expected):
    samples = [
        Sample(
            prompt_id="p",
            sample_index=index,
            response_token_ids=None,
            rollout_log_probs=None,
            finish_reason="stop",
            policy_version=0,
            reward=reward,
        )
        for index, reward in enumerate(rewards)
    ]
    assert RolloutGroup(prompt=None, samples=samples).has_signal is expected


LOSS_WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
import torch
from megatron_fipo.algorithms.losses import fipo_loss
from megatron_fipo.config.algorithm import FipoConfig
log_probs = torch.full((2, 5), -1.0, requires_grad=True)
mask = torch.ones(2, 5, dtype=torch.bool)
output = fipo_loss(log_probs, log_probs.detach(), torch.ones(2), mask, FipoConfig.preset("official-32b"))
output.loss.backward()
print(float(output.loss), tuple(log_probs.grad.shape), len(output.metrics) > 0)
"""


def test_the_losses_run_without_numpy():
    result = subprocess.run([sys.executable, "-c", LOSS_WITHOUT_NUMPY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "-1.0 (2, 5) True"


def test_a_ratio_divides_sums():
    values, weights = torch.tensor([3.0, 5.0, math.nan]), torch.tensor([1.0, 3.0, math.nan])
    ratio = Accumulator.ratio(values, weights, torch.tensor([True, True, False]))
    assert plain(ratio) == ("mean", 8.0, 4.0)
    assert plain(ratio.merge(Accumulator.ratio(values, weights, torch.tensor([True, False, False])))) == (
        "mean",
        11.0,
        5.0,
    )


numbers = st.floats(width=32, allow_nan=False)
LEVELS = (1, 10, 250, 500, 995, 999, 1000)


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=40), st.integers(0, 40))
def test_quantiles_are_the_nearest_ranks(pairs, cut):
    values, mask = torch.tensor([value for value, _ in pairs]), torch.tensor([counts for _, counts in pairs])
    parts = [Distribution.of(values[part], mask[part], LEVELS) for part in (slice(cut), slice(cut, None))]
    found = render_metrics({"x": parts[0].merge(parts[1])})
    counted = values[mask].numpy()
    if not counted.size:
        assert found == {}
        return
    expected = np.sort(counted)[[math.ceil(level * counted.size / 1000) - 1 for level in LEVELS]]
    assert [found[f"x_{quantile_suffix(level)}"] for level in LEVELS] == expected.tolist()


def test_a_distribution_refuses_other_levels():
    values, mask = torch.ones(1), torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match="levels"):
        Distribution.of(values, mask, (500,)).merge(Distribution.of(values, mask, (250,)))


def test_quantiles_have_short_names():
    names = [quantile_suffix(level) for level in (1, 10, 250, 500, 990, 995, 999)]
    assert names == ["p001", "p01", "p25", "p50", "p99", "p995", "p999"]


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
