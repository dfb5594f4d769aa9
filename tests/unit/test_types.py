"""Accumulators merge the same in any order and grouping; the losses need torch alone."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.types import Accumulator, Metrics, RolloutGroup, Sample, merge_metrics

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
