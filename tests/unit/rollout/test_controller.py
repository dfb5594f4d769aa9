import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.baselines import DapoConfig
from megatron_fipo.config.reward import PythonTerm, RewardConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.metrics.rollout_metrics import group_metrics
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.admission import Admission, NoSignalError
from megatron_fipo.rollout.batch_recipe import BatchRecipe, CollectedGroups
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
from megatron_fipo.rollout.sample_records import sample_records
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.runtime.errors import NonFiniteError, RunError
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.types import Prompt, RolloutGroup, Sample

SAMPLING = SamplingParameters(temperature=1.0, top_p=1.0, max_tokens=3, stop_token_ids=(99,))
STOP = 99


class SeedEngine:
    """Answers every request at once with tokens made from its seed, the last request first."""

    def __init__(
        self,
        versions: Sequence[int] = (0,),
        lose: Collection[int] = (),
        repeat: bool = False,
        log_prob: float = -0.5,
    ) -> None:
        self.versions, self.lose, self.repeat, self.log_prob = list(versions), set(lose), repeat, log_prob
        self.seen: list[GenerationRequest] = []
        self._queue: list[GenerationRequest] = []

    async def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self.seen.extend(requests)
        self._queue.extend(requests)

    async def stream(self) -> AsyncIterator[GenerationResult]:
        queue, self._queue = self._queue, []
        for number, request in reversed(list(enumerate(queue))):
            if number not in self.lose:
                for _ in range(2 if self.repeat else 1):
                    yield self._answer(number, request)

    async def abort(self, request_ids: Collection[str]) -> None:
        self._queue = [request for request in self._queue if request.request_id not in set(request_ids)]

    def _answer(self, number: int, request: GenerationRequest) -> GenerationResult:
        stops = request.seed % 3 > 0
        tokens = [request.seed % 7, STOP] if stops else [request.seed % 7, 1, 2]
        return GenerationResult(
            request_id=request.request_id,
            token_ids=np.array(tokens, dtype=np.int32),
            log_probs=np.array([-0.5, *[self.log_prob] * (len(tokens) - 1)], dtype=np.float32),
            finish_reason="stop" if stops else "length",
            policy_version=self.versions[number % len(self.versions)],
        )


@pytest.fixture(scope="module", autouse=True)
def pool() -> Iterator[RewardPool]:
    """Scores every controller's responses."""
    path = Path(__file__).with_name("first_token.py")
    config = RewardConfig(terms={"first": PythonTerm(function=f"{path}:reward")}, require_stop=False)
    with RewardPool(config, SAMPLING.max_tokens) as opened:
        _POOLS.append(opened)
        yield opened
        _POOLS.clear()


_POOLS: list[RewardPool] = []


def make_prompts(answers: str) -> list[Prompt]:
    """One prompt a letter: s gets rewards that differ, n gets none, r breaks the scorer."""
    kinds = {"s": "signal", "n": "none", "r": "refuse"}
    return [
        Prompt(id=f"p{place}", token_ids=np.array([place], dtype=np.int32), text="", answer=kinds[letter])
        for place, letter in enumerate(answers)
    ]


class Prompts:
    """Draws the prompts in turn, epoch after epoch."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts, self.num_drawn = prompts, 0

    @property
    def epoch(self) -> int:
        return self.num_drawn // len(self.prompts)

    def counters(self) -> dict[str, float]:
        return {"data/p/drawn": float(self.num_drawn)}

    def next(self, n: int) -> list[Prompt]:
        drawn = [self.prompts[number % len(self.prompts)] for number in range(self.num_drawn, self.num_drawn + n)]
        self.num_drawn += n
        return drawn

    def state_dict(self) -> dict[str, int]:
        return {"num_drawn": self.num_drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_drawn = state["num_drawn"]


def make_controller(answers: str, engine: SeedEngine | None = None, **config: Any) -> RolloutController:
    values = {"num_prompts_per_step": 4, "group_size": 4, "max_generation_rounds": 3} | config
    drop, on_error = values.pop("drop", True), values.pop("on_error", "fatal")
    progress = values.pop("progress", NO_PROGRESS)
    return RolloutController(
        engine=engine or SeedEngine(),
        scoring=Scoring(_POOLS[0], on_error),
        decode=lambda ids: " ".join(map(str, ids)),
        config=RolloutConfig(**values),
        sampling=SAMPLING,
        seed=5,
        recipe=BatchRecipe(
            stream=Prompts(make_prompts(answers)),
            algorithm=DapoConfig(drop_zero_variance_groups=drop, updates_per_rollout=2),
            num_records=3,
        ),
        progress=progress,
    )


def rollout(controller: RolloutController, step: int = 1, policy_version: int = 0) -> CollectedGroups:
    return asyncio.run(controller.collect(step, policy_version))


def ids(groups: Sequence[RolloutGroup]) -> list[str]:
    return [group.prompt.id for group in groups]


def group(name: str, rewards: Sequence[float], versions: Sequence[int] = (3,)) -> RolloutGroup:
    empty = np.empty(0, dtype=np.int32)
    return RolloutGroup(
        prompt=Prompt(id=name, token_ids=empty, text=""),
        samples=[
            Sample(
                prompt_id=name,
                sample_index=index,
                response_token_ids=empty,
                rollout_log_probs=empty.astype(np.float32),
                finish_reason="stop",
                policy_version=versions[index % len(versions)],
                reward=reward,
            )
            for index, reward in enumerate(rewards)
        ],
    )


def test_admission_takes_groups_with_a_signal_until_it_is_full() -> None:
    admission = Admission(wanted=2, drop_zero_variance=True, policy_lag=0)
    for name, rewards in [("a", [1, 1]), ("b", [0, 1]), ("c", [0, 0]), ("d", [1, 0]), ("e", [1, 0])]:
        admission.offer(group(name, rewards), policy_version=3)
    assert ids(admission.accepted) == ["b", "d"]
    assert ids(admission.without_signal) == ["a", "c"]
    assert (admission.missing, admission.num_stale) == (0, 0)
    assert admission.fill_up() == 0
    assert ids(admission.accepted) == ["b", "d"]


def test_admission_without_dynamic_sampling_takes_every_group() -> None:
    admission = Admission(wanted=2, drop_zero_variance=False, policy_lag=0)
    for name, rewards in [("a", [1, 1]), ("b", [0, 1])]:
        admission.offer(group(name, rewards), policy_version=3)
    assert ids(admission.accepted) == ["a", "b"]
    assert admission.without_signal == []


def test_a_batch_is_filled_up_with_the_first_groups_that_were_set_aside() -> None:
    admission = Admission(wanted=4, drop_zero_variance=True, policy_lag=0)
    for name, rewards in [("a", [1, 1]), ("b", [0, 1]), ("c", [0, 0]), ("d", [1, 1])]:
        admission.offer(group(name, rewards), policy_version=3)
    assert admission.missing == 3
    assert admission.fill_up() == 3
    assert ids(admission.accepted) == ["b", "a", "c", "d"]
    short = Admission(wanted=4, drop_zero_variance=True, policy_lag=0)
    short.offer(group("a", [1, 1]), policy_version=3)
    assert short.fill_up() == 1
    assert short.missing == 3


@pytest.mark.parametrize(("lag", "accepted"), [(0, ["now"]), (1, ["now", "mixed"]), (2, ["now", "mixed", "old"])])
def test_a_group_is_as_old_as_its_oldest_sample(lag: int, accepted: list[str]) -> None:
    admission = Admission(wanted=9, drop_zero_variance=True, policy_lag=lag)
    for name, versions in [("now", [3, 3]), ("mixed", [3, 2]), ("old", [1, 3]), ("older", [0, 3])]:
        admission.offer(group(name, [0, 1], versions), policy_version=3)
    assert ids(admission.accepted) == accepted
    assert admission.num_stale == 4 - len(accepted)


def test_samples_are_the_engines_answers_to_their_own_requests() -> None:
    engine = SeedEngine(versions=[7])
    controller = make_controller("ss", engine, num_prompts_per_step=3)
    groups = rollout(controller, step=4, policy_version=7).groups
    assert ids(groups) == ["p0", "p1", "p0"], "the third is the next epoch's first"
    for place, each in enumerate(groups):
        assert [sample.sample_index for sample in each.samples] == [0, 1, 2, 3]
        for sample in each.samples:
            seed = derive_seed(5, "4.0", place, each.prompt.id, sample.sample_index)
            stops = seed % 3 > 0
            assert sample.response_token_ids.tolist() == ([seed % 7, STOP] if stops else [seed % 7, 1, 2])
            assert sample.finish_reason == ("stop" if stops else "length")
            # The stop token is kept among the tokens and left out of the text.
            assert sample.response_text == (f"{seed % 7}" if stops else f"{seed % 7} 1 2")
            assert sample.rollout_log_probs.tolist() == [-0.5] * len(sample.response_token_ids)
            assert (sample.prompt_id, sample.policy_version) == (each.prompt.id, 7)
            assert sample.reward == sample.score == sample.reward_terms["first"] == seed % 7
    assert len({request.seed for request in engine.seen}) == 12, "two draws of one prompt differ"
    assert all(request.sampling == SAMPLING for request in engine.seen)


def test_a_rollout_is_a_batch_with_what_is_told_of_it() -> None:
    groups = rollout(make_controller("ssss"), step=2)
    result = asyncio.run(make_controller("ssss").next_rollout(2, 0))
    samples = [sample for each in groups.groups for sample in each.samples]
    assert result.batch.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert result.batch.mini_batch_ids.tolist() == [0] * 8 + [1] * 8
    assert result.batch.rewards.tolist() == [sample.reward for sample in samples]
    responses = [sample.response_token_ids for sample in samples]
    np.testing.assert_array_equal(result.batch.token_ids[result.batch.response_mask], np.concatenate(responses))
    assert result.metrics == groups.metrics | group_metrics(groups.groups)
    assert result.records == sample_records(2, groups.groups, 3)
    assert len(result.records) == 3


def test_the_same_step_gives_the_same_rollout() -> None:
    first, again = (rollout(make_controller("ssss")) for _ in range(2))
    other = rollout(make_controller("ssss"), step=2)
    tokens = [
        [sample.response_token_ids.tolist() for each in one.groups for sample in each.samples]
        for one in (first, again, other)
    ]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


def test_dynamic_sampling_replaces_groups_by_fresh_prompts() -> None:
    result = rollout(make_controller("snsnnsssss"))
    assert ids(result.groups) == ["p0", "p2", "p5", "p6"]
    rewards = [sample.reward for each in result.groups for sample in each.samples]
    # p0 to p3, then p4 and p5, then p6.
    assert result.metrics == {
        "rollout/reward_mean_all": sum(rewards) / 28,
        "rollout/reward_errors": 0,
        "rollout/reward_timeouts": 0,
        "rollout/reward_bad_references": 0,
        "rollout/generation_rounds": 3,
        "rollout/groups_generated": 7,
        "rollout/response_tokens_generated": result.metrics["rollout/response_tokens_generated"],
        "rollout/groups_without_signal": 3,
        "rollout/groups_all_right": 0,
        "rollout/groups_filled_up": 0,
        "rollout/groups_stale": 0,
        "rollout/groups_incomplete": 0,
        "rollout/groups_carried_in": 0,
        "rollout/groups_surplus": 0,
        "rollout/epoch": 0,
        "data/p/drawn": 7.0,
    }


def test_a_round_asks_for_the_missing_groups_alone() -> None:
    engine = SeedEngine()
    rollout(make_controller("snsnnsssss", engine))
    assert [request.prompt_id for request in engine.seen[::4]] == [
        *("0:p0", "1:p1", "2:p2", "3:p3"),
        *("0:p4", "1:p5"),
        "0:p6",
    ]


def test_over_sampling_spares_rounds_and_leaves_a_surplus() -> None:
    result = rollout(make_controller("snsnnsssss", over_sampling=2.0))
    assert ids(result.groups) == ["p0", "p2", "p5", "p6"]
    assert result.metrics["rollout/generation_rounds"] == 1
    assert result.metrics["rollout/groups_generated"] == 8
    # Eight groups of four responses, of two or three tokens each.
    assert 64 < result.metrics["rollout/response_tokens_generated"] < 96
    assert result.metrics["rollout/groups_surplus"] == 1


def test_surplus_is_discarded_unless_it_may_be_carried_over() -> None:
    controller = make_controller("ssssssssss", over_sampling=1.5)
    rollout(controller)
    assert controller.surplus == []
    assert ids(rollout(controller, step=2).groups) == ["p6", "p7", "p8", "p9"]


def test_a_batch_begins_with_the_surplus_of_the_one_before() -> None:
    engine = SeedEngine(versions=[0])
    controller = make_controller("s" * 20, engine, over_sampling=1.5, carry_over_max_lag=1)
    first = rollout(controller)
    assert (ids(first.groups), ids(controller.surplus)) == (["p0", "p1", "p2", "p3"], ["p4", "p5"])
    engine.versions = [1]
    second = rollout(controller, step=2, policy_version=1)
    assert ids(second.groups) == ["p4", "p5", "p6", "p7"]
    assert [each.samples[0].policy_version for each in second.groups] == [0, 0, 1, 1]
    assert second.metrics["rollout/groups_carried_in"] == 2
    assert second.metrics["rollout/groups_generated"] == 3
    assert ids(controller.surplus) == ["p8"]
    # Two versions later the surplus is too old.
    engine.versions = [3]
    third = rollout(controller, step=4, policy_version=3)
    assert ids(third.groups) == ["p9", "p10", "p11", "p12"]
    assert third.metrics["rollout/groups_stale"] == 1


def test_a_surplus_that_fills_the_batch_needs_no_generation() -> None:
    controller = make_controller("s" * 20, over_sampling=3.0, carry_over_max_lag=2)
    rollout(controller)
    second = rollout(controller, step=2, policy_version=1)
    assert ids(second.groups) == ["p4", "p5", "p6", "p7"]
    assert second.metrics["rollout/generation_rounds"] == 0
    assert "rollout/reward_mean_all" not in second.metrics
    assert second.metrics["rollout/response_tokens_generated"] == 0
    assert ids(controller.surplus) == ["p8", "p9", "p10", "p11"]


def test_a_controller_goes_on_where_another_one_stood(tmp_path: Path) -> None:
    first, second = (make_controller("ssssssssssss", over_sampling=1.5, carry_over_max_lag=1) for _ in range(2))
    rollout(first)
    assert len(first.surplus) == 2
    asyncio.run(first.save(tmp_path / "state.npz"))
    second.restore(1, tmp_path / "state.npz")
    batches = [rollout(controller, step=2) for controller in (first, second)]
    assert batches[0].metrics["rollout/groups_carried_in"] == 2
    assert batches[0].metrics == batches[1].metrics
    responses = [
        [sample.response_token_ids.tolist() for group in batch.groups for sample in group.samples] for batch in batches
    ]
    assert responses[0] == responses[1]


def test_a_rollout_that_is_broken_off_has_drawn_nothing() -> None:
    class Stopping(SeedEngine):
        async def stream(self) -> AsyncIterator[GenerationResult]:
            async for result in super().stream():
                if self.stops:
                    raise asyncio.CancelledError
                yield result

        stops = False

    engine = Stopping()
    controller, other = (make_controller("ssssssssssss", e, over_sampling=1.5) for e in (engine, None))
    for step in (1, 2):
        engine.stops = True
        with pytest.raises(asyncio.CancelledError):
            rollout(controller, step)
        engine.stops = False
        assert rollout(controller, step).metrics == rollout(other, step).metrics


def test_a_group_of_one_is_refused() -> None:
    admission = Admission(wanted=2, drop_zero_variance=False, policy_lag=0)
    admission.offer(group("a", [1]), policy_version=3)
    admission.offer(group("b", []), policy_version=3)
    assert (admission.missing, admission.num_incomplete) == (2, 2)


def test_groups_without_signal_are_told_apart_by_their_scores() -> None:
    admission = Admission(wanted=2, drop_zero_variance=True, policy_lag=0)
    for name, score in [("right", 1.0), ("wrong", 0.0)]:
        each = group(name, [1, 1])
        for sample in each.samples:
            sample.score = score
        admission.offer(each, policy_version=3)
    assert admission.counters()["rollout/groups_without_signal"] == 2
    assert admission.counters()["rollout/groups_all_right"] == 1


def test_after_the_last_round_the_batch_is_filled_up() -> None:
    result = rollout(make_controller("snnnnnnnnnnn", max_generation_rounds=2))
    assert ids(result.groups) == ["p0", "p1", "p2", "p3"]
    assert result.metrics["rollout/groups_filled_up"] == 3
    assert result.metrics["rollout/groups_without_signal"] == 6
    assert result.metrics["rollout/generation_rounds"] == 2


def test_without_dynamic_sampling_one_round_is_enough() -> None:
    result = rollout(make_controller("nnnn", drop=False))
    assert ids(result.groups) == ["p0", "p1", "p2", "p3"]
    assert result.metrics["rollout/generation_rounds"] == 1
    assert result.metrics["rollout/reward_mean_all"] == 0.0


def test_no_signal_in_any_round_ends_the_run_with_the_reason() -> None:
    with pytest.raises(NoSignalError) as caught:
        rollout(make_controller("nnnnn"), step=6)
    assert str(caught.value) == (
        "step 6: rollout.max_generation_rounds = 3: none of 12 groups had differing rewards (mean reward 0.000); the "
        "task is too easy or too hard for this model, or the reward is broken ('' was answered '5'); mend that, or set "
        "algorithm.drop_zero_variance_groups to false"
    )


def test_nothing_but_stale_groups_ends_the_run_with_that_reason() -> None:
    with pytest.raises(RunError) as caught:
        rollout(make_controller("ssss", SeedEngine(versions=[1])), policy_version=2)
    assert not isinstance(caught.value, NoSignalError)
    assert str(caught.value) == (
        "step 1: 4 of 4 groups are missing after 3 rounds of 12 groups: 12 were older than rollout.policy_lag = 0 "
        "allows, 0 had fewer than two responses with a reward; allow a greater lag or more rounds, or mend the reward"
    )


def test_a_lost_request_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"the engine lost 2 requests, 1:p1#1 first"):
        rollout(make_controller("ssss", SeedEngine(lose={5, 14})))


def test_a_result_that_comes_twice_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"a result for 3:p3#3, which was not asked for"):
        rollout(make_controller("ssss", SeedEngine(repeat=True)))


@pytest.mark.parametrize("log_prob", [float("nan"), float("-inf")])
def test_a_response_without_a_probability_ends_the_run(log_prob: float) -> None:
    with pytest.raises(NonFiniteError) as caught:
        rollout(make_controller("ssss", SeedEngine(log_prob=log_prob)))
    # The engine answers the last request first.
    assert str(caught.value) == (
        f"prompt p3, sample 3: the log-probability of response token 1 is {log_prob}; the engine's weights of policy "
        "version 0 are broken: check the model's files, or lower optimizer.learning_rate"
    )


def test_a_response_that_cannot_be_scored_ends_the_run() -> None:
    with pytest.raises(RunError, match="reward of p1#[0-3]: first: ValueError: the scorer broke down"):
        rollout(make_controller("srss"))


def test_responses_that_cannot_be_scored_leave_their_groups() -> None:
    result = rollout(make_controller("srsss", on_error="skip"))
    assert ids(result.groups) == ["p0", "p2", "p3", "p4"]
    assert result.metrics["rollout/reward_errors"] == 4
    assert result.metrics["rollout/groups_incomplete"] == 1


class Listener(Progress):
    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self.responses: list[tuple[str, str, float]] = []

    def advance(self, done: int, total: int) -> None:
        self.counts.append((done, total))

    def show_response(self, prompt: str, response: str, reward: float) -> None:
        self.responses.append((prompt, response, reward))


def test_a_watcher_hears_of_every_response_and_of_each_rounds_number() -> None:
    listener = Listener()
    controller = make_controller("snssss", num_prompts_per_step=2, group_size=2, progress=listener)
    batch = rollout(controller)
    totals = [total for done, total in listener.counts if done == 0]
    assert len(totals) == batch.metrics["rollout/generation_rounds"] > 1
    assert listener.counts == [(done, total) for total in totals for done in range(total + 1)]
    assert len(listener.responses) == sum(totals) == 2 * batch.metrics["rollout/groups_generated"]
    sample = batch.groups[0].samples[0]
    assert ("", sample.response_text, sample.reward) in listener.responses
