from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.safeguards import SafeguardsConfig
from megatron_fipo.trainer.collapse import CollapseWatch
from megatron_fipo.types import TrainBatch
from tests.tiny_actors import random_batch

LIMITS = {"collapse_window_steps": 2, "max_steps_without_signal": 2}


def batch(reward: float = 0.5, response: int = 10, has_signal: bool = True) -> TrainBatch:
    """Two sequences with a prompt of 4 tokens each."""
    base = random_batch([4 + response, 4 + response])
    values: dict[str, Any] = {name: getattr(base, name) for name in TrainBatch.__slots__}
    values |= {
        "prompt_lengths": np.array([4, 4], dtype=np.int32),
        "rewards": np.array([reward, reward], dtype=np.float32),
        "advantages": np.array([1, -1] if has_signal else [0, 0], dtype=np.float32),
    }
    return TrainBatch(**values)


def said(watch: CollapseWatch, batches: list[TrainBatch], truncated: float | None = None) -> list[list[str]]:
    return [watch.see(each, truncated) for each in batches]


def test_a_reward_that_turns_is_told_once_and_again_after_it_came_back() -> None:
    watch = CollapseWatch(SafeguardsConfig(**LIMITS, max_reward_drop=0.3))
    rewards = [0.2, 0.6, 0.8, 0.6, 0.25, 0.1, 0.1, 0.9, 0.9, 0.0]
    told = said(watch, [batch(reward) for reward in rewards])
    # Windows: –, 0.4, 0.7, 0.7, 0.425, 0.175, 0.1, 0.5, 0.9, 0.45.
    assert [len(each) for each in told] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert told[5] == [
        "the mean reward of 2 steps, 0.175, lies 0.525 below the best of the run, 0.700 "
        "(safeguards.max_reward_drop = 0.3)"
    ]
    assert watch.metrics()["rollout/reward_drop"] == pytest.approx(0.45)


def test_lengths_that_fall_and_lengths_at_the_limit_are_told() -> None:
    watch = CollapseWatch(SafeguardsConfig(**LIMITS, min_length_fraction=0.25, max_truncated_fraction=0.9))
    told = said(watch, [batch(response=length) for length in (40, 40, 20, 8, 8)])
    assert [len(each) for each in told] == [0, 0, 0, 0, 1]
    assert "has fallen to 0.200 of the longest of the run, 40.0 tokens" in told[4][0]
    assert watch.metrics()["rollout/length_fraction"] == pytest.approx(0.2)
    watch = CollapseWatch(SafeguardsConfig(**LIMITS))
    told = [watch.see(batch(), part) for part in (0.8, 0.9, 0.95)]
    assert [len(each) for each in told] == [0, 0, 1]
    assert "has cut off 0.925 of the responses of 2 steps" in told[2][0]


def test_steps_without_signal_are_counted_in_a_row() -> None:
    watch = CollapseWatch(SafeguardsConfig(**LIMITS))
    signals = [False, False, True, False, False, False]
    told = said(watch, [batch(has_signal=each) for each in signals])
    assert [len(each) for each in told] == [0, 0, 0, 0, 0, 1]
    assert told[5][0].startswith("for 3 steps every group has had equal rewards")


def test_a_window_of_zero_steps_judges_neither_reward_nor_length() -> None:
    watch = CollapseWatch(SafeguardsConfig(collapse_window_steps=0))
    assert said(watch, [batch(1.0, 40), batch(-9.0, 1)] * 3, 1.0) == [[]] * 6
    assert watch.metrics() == {"rollout/steps_without_signal": 0}


def test_a_watch_goes_on_from_its_state() -> None:
    config = SafeguardsConfig(**LIMITS)
    second = CollapseWatch(config)
    batches = [batch(reward, length) for reward, length in ((0.9, 40), (0.9, 30), (0.5, 4), (0.1, 4), (0.1, 4))]
    for place in range(1, 5):
        before = CollapseWatch(config)
        said(before, batches[:place], 0.95)
        second.load_state_dict(before.state_dict())
        assert said(second, batches[place:], 0.95) == said(before, batches[place:], 0.95)
        assert second.state_dict() == before.state_dict()
