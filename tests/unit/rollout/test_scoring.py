"""Rewards of a stream of samples, and what becomes of those without one."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.reward import ExactMatchTerm, NumericTerm, RewardConfig
from megatron_fipo.rewards.base import RewardError
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.types import Prompt, RolloutGroup, Sample


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    # The sum of two such weights is beyond float64: a failure, where both terms are right.
    terms = {"same": ExactMatchTerm(weight=1e308), "near": NumericTerm(weight=1e308)}
    with RewardPool(RewardConfig(terms=terms), max_response_tokens=8) as opened:
        yield opened


def group(name: str, reference: str, responses: list[str], **changes: Any) -> RolloutGroup:
    ids = np.array([1, 2], dtype=np.int32)
    samples = [
        Sample(
            prompt_id=name,
            sample_index=index,
            response_token_ids=ids,
            rollout_log_probs=ids.astype(np.float32),
            finish_reason="stop",
            policy_version=0,
            response_text=text,
        )
        for index, text in enumerate(responses)
    ]
    return RolloutGroup(prompt=Prompt(id=name, token_ids=ids, text="q", answer=reference), samples=samples)


def collect(scoring: Scoring, *groups: RolloutGroup) -> list[tuple[str, int]]:
    async def drive() -> list[tuple[str, int]]:
        for each in groups:
            for sample in each.samples:
                scoring.hand_in(each, sample)
        return [(each.prompt.id, sample.sample_index) async for each, sample in scoring.collect()]

    return asyncio.run(drive())


def test_samples_get_what_was_found(pool: RewardPool) -> None:
    groups = [group("a", "2", ["2.0", "3"]), group("b", "5", ["1", "It is 5"])]
    assert collect(Scoring(pool, "fatal"), *groups) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    samples = [sample for each in groups for sample in each.samples]
    assert [sample.score for sample in samples] == [0.0] * 4, "the first term's alone"
    assert [sample.reward for sample in samples] == [1e308, 0.0, 0.0, 1e308]
    assert samples[0].reward_terms == {"same": 0.0, "near": 1e308}
    assert [sample.answer for sample in samples] == ["2.0", "3", "1", "It is 5"]


def test_a_failure_ends_the_run_or_leaves_its_group(pool: RewardPool, caplog: pytest.LogCaptureFixture) -> None:
    bad = group("a", "2", ["2", "3", "2"])
    with pytest.raises(RewardError) as caught:
        collect(Scoring(pool, "fatal"), bad)
    assert str(caught.value) == "reward of a#0: the sum: inf is not a finite number"
    assert caught.value.sample_id == "a#0"

    scoring, bad = Scoring(pool, "skip"), group("a", "2", ["2", "3", "2"])
    with caplog.at_level(logging.WARNING):
        assert collect(scoring, bad) == [("a", 1)]
    assert [sample.sample_index for sample in bad.samples] == [1]
    assert caplog.messages == [
        f"reward of a#{index}: the sum: inf is not a finite number; left out" for index in (0, 2)
    ]
    assert scoring.counters()["rollout/reward_errors"] == 2
    assert scoring.counters()["rollout/reward_errors"] == 0, "counted since the last call"


@pytest.mark.parametrize("on_error", ["fatal", "skip"])
def test_a_bad_reference_is_told_once_and_never_fatal(
    pool: RewardPool, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scoring = Scoring(pool, on_error)
    bad, good = group("bad", "two", ["2", "3"]), group("good", "2", ["3"])
    with caplog.at_level(logging.WARNING):
        assert collect(scoring, bad, good) == [("good", 0)]
        collect(scoring, group("bad", "two", ["2"]))
    assert bad.samples == []
    assert caplog.messages == ["prompt bad cannot be scored by near: the reference answer 'two' is no number"]
    assert scoring.counters() == {
        "rollout/reward_errors": 0,
        "rollout/reward_timeouts": 0,
        "rollout/reward_bad_references": 3,
    }
