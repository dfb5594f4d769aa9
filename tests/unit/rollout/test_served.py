"""Scheduling for served engines, in simulated time: tests/simulated_rollouts.py."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.data.stream import EndOfPrompts
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.rollout.admission import NoSignalError
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.ledger import Settled
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import Prompt, RolloutGroup
from tests.simulated_rollouts import (
    SAMPLING,
    SimulatedEngine,
    Simulation,
    Step,
    now,
    number_of,
    simulate,
    train,
    used_groups,
)

ONE_BATCH_AT_ONCE = {"max_requests_in_flight": 8}
"""As if the servers had no room for more."""


async def run(simulation: Simulation, num_steps: int, **schedule: Any) -> list[Step]:
    controller, _ = simulation.build()
    steps = await train(controller, num_steps, **schedule)
    await controller.close()
    return steps


def ids(groups: Sequence[RolloutGroup]) -> list[str]:
    return [group.prompt.id for group in groups]


def batches(steps: Sequence[Step]) -> list[list[str]]:
    return [ids(step.collected.groups) for step in steps]


def seconds(steps: Sequence[Step]) -> list[float]:
    return [round(step.ended - step.began, 3) for step in steps]


def test_without_a_lag_nothing_is_generated_while_the_trainer_trains() -> None:
    steps = simulate(run(Simulation(lengths=lambda prompt, sample: 100), 3, train_s=7.0))
    assert batches(steps) == [[f"p{4 * step + place}" for place in range(4)] for step in range(3)]
    assert seconds(steps) == [17.0] * 3
    assert [step.collected.metrics["rollout/wait_s"] for step in steps] == pytest.approx([10.0] * 3)
    assert [step.collected.metrics["rollout/overlap_fraction"] for step in steps] == [0.0] * 3
    assert [step.collected.metrics["rollout/serving_s"] for step in steps] == pytest.approx([10.0] * 3)
    assert not CATALOGUE.undeclared(steps[0].collected.metrics)


def test_a_refused_group_is_replaced_while_others_run() -> None:
    # p0 has no signal and is done after 1 s; p4 takes its place for 6 s, while p1 takes 10 s.
    lengths = {0: 10, 1: 100, 4: 60}
    simulation = Simulation(
        lengths=lambda prompt, sample: lengths.get(prompt, 50), answer_of=lambda p: "none" if p == 0 else "signal"
    )
    (step,) = simulate(run(simulation, 1))
    assert ids(step.collected.groups) == ["p1", "p2", "p3", "p4"]
    assert step.got == 10.0
    metrics = step.collected.metrics
    assert (metrics["rollout/groups_generated"], metrics["rollout/groups_without_signal"]) == (5, 1)
    assert metrics["rollout/generation_rounds"] == 2
    assert metrics["rollout/response_tokens_generated"] == 2 * (10 + 100 + 50 + 50 + 60)
    assert step.collected.settled[-1] == Settled(0, "p0", "no_signal")


def test_a_group_without_rewards_is_replaced_too() -> None:
    simulation = Simulation(answer_of=lambda prompt: "broken" if prompt == 2 else "signal")
    (step,) = simulate(run(simulation, 1))
    assert ids(step.collected.groups) == ["p0", "p1", "p3", "p4"]
    assert step.collected.metrics["rollout/groups_incomplete"] == 1
    assert step.collected.metrics["rollout/reward_bad_references"] == 2


def test_over_sampling_cuts_the_long_tail() -> None:
    def lengths(prompt: int, sample: int) -> int:
        return 900 if prompt == 2 else 50 + prompt

    waits = {}
    for over_sampling in (1.0, 1.5):
        simulation = Simulation(lengths=lengths, config={"over_sampling": over_sampling})
        (step,) = simulate(run(simulation, 1))
        waits[over_sampling] = step.got
    assert waits == {1.0: 90.0, 1.5: 5.4}
    assert ids(step.collected.groups) == ["p0", "p1", "p3", "p4"]
    metrics = step.collected.metrics
    # p5 would have ended a moment later.
    assert (metrics["rollout/groups_cut"], metrics["rollout/groups_surplus"]) == (2, 0)
    assert metrics["rollout/groups_generated"] == 4


def test_what_is_cut_costs_its_tokens_and_leaves_the_servers() -> None:
    async def work() -> tuple[list[Step], SimulatedEngine]:
        simulation = Simulation(
            lengths=lambda prompt, sample: 900 if prompt == 2 else 50, config={"over_sampling": 1.5}
        )
        controller, engine = simulation.build()
        steps = await train(controller, 2, train_s=1.0)
        assert engine.num_in_flight == 0
        await controller.close()
        return steps, engine

    steps, _ = simulate(work())
    # Two samples at 10 tokens a second for 5 s, less the last one each that is not yet out; counted when they are back.
    assert steps[1].collected.metrics["rollout/response_tokens_discarded"] == pytest.approx(100, abs=2)
    assert [(each.number, each.fate) for each in steps[0].collected.settled] == [
        *((number, "used") for number in (0, 1, 3, 4)),
        (5, "surplus"),
        (2, "cut"),
    ]


def test_finished_surplus_begins_the_next_batch_within_its_lag() -> None:
    simulation = Simulation(config={"over_sampling": 1.5, "carry_over_max_lag": 1})
    steps = simulate(run(simulation, 3))
    assert batches(steps) == [["p0", "p1", "p2", "p3"], ["p4", "p5", "p6", "p7"], ["p8", "p9", "p10", "p11"]]
    assert [step.collected.metrics["rollout/groups_carried_in"] for step in steps] == [0, 2, 1]
    assert [step.collected.metrics["rollout/groups_surplus"] for step in steps] == [2, 1, 2]
    assert steps[1].collected.metrics["rollout/staleness_1_fraction"] == 0.5
    assert [each.is_ready for each in steps[0].collected.open_prompts] == [True, True]


def test_with_a_lag_generation_hides_behind_training() -> None:
    times = {}
    for lag in (0, 1):
        simulation = Simulation(lengths=lambda prompt, sample: 100, config=ONE_BATCH_AT_ONCE | {"policy_lag": lag})
        steps = simulate(run(simulation, 6, train_s=12.0))
        times[lag] = seconds(steps)
    assert times[0] == [22.0] * 6
    # The first batch is generated while nobody trains.
    assert times[1] == [22.0, *[12.0] * 5]
    assert [step.collected.metrics["rollout/overlap_fraction"] for step in steps] == [0.0, *[1.0] * 5]
    assert batches(steps) == [[f"p{4 * step + place}" for place in range(4)] for step in range(6)]


def test_where_generation_takes_longer_the_trainer_waits_for_the_difference() -> None:
    simulation = Simulation(lengths=lambda prompt, sample: 100, config=ONE_BATCH_AT_ONCE | {"policy_lag": 1})
    steps = simulate(run(simulation, 4, train_s=4.0, mode="retract"))
    assert seconds(steps) == [14.0, *[10.0] * 3]
    assert steps[2].collected.metrics["rollout/wait_s"] == pytest.approx(6.0)
    assert steps[2].collected.metrics["rollout/overlap_fraction"] == pytest.approx(0.4)
    assert steps[2].collected.metrics["rollout/serving_s"] == pytest.approx(10.0)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_staleness_is_that_of_the_schedule(lag: int) -> None:
    simulation = Simulation(lengths=lambda prompt, sample: 20, config={"policy_lag": lag})
    steps = simulate(run(simulation, 6, train_s=10.0))
    # All groups of the first lag + 1 batches are begun at once, by version 0; later ones a whole lag ahead.
    lags = [min(version, lag) for version in range(6)]
    for step, expected in zip(steps, lags, strict=True):
        told = {name: value for name, value in step.collected.metrics.items() if "staleness" in name}
        assert told == {
            f"rollout/{kind}_{suffix}": value
            for kind in ("staleness", "token_staleness")
            for suffix, value in (("mean", expected), ("max", expected), (f"{expected}_fraction", 1.0))
        }
        assert not CATALOGUE.undeclared(told)


def test_tokens_after_a_sync_count_with_their_own_version() -> None:
    # 10 s of generation for a batch; after the first 4 s of it the servers have version 1.
    simulation = Simulation(lengths=lambda prompt, sample: 100, config=ONE_BATCH_AT_ONCE | {"policy_lag": 1})
    steps = simulate(run(simulation, 2, train_s=4.0, mode="in_place"))
    sample = steps[1].collected.groups[0].samples[0]
    assert sample.policy_version == 0
    assert sample.token_versions.tolist() == [0] * 40 + [1] * 60
    metrics = steps[1].collected.metrics
    assert metrics["rollout/staleness_1_fraction"] == 1.0
    assert metrics["rollout/token_staleness_1_fraction"] == pytest.approx(0.4)
    assert metrics["rollout/token_staleness_0_fraction"] == pytest.approx(0.6)


@pytest.mark.parametrize("partial", [False, True])
def test_an_interrupted_response_begins_again_or_goes_on(partial: bool) -> None:
    async def work() -> tuple[list[Step], SimulatedEngine]:
        config = ONE_BATCH_AT_ONCE | {"policy_lag": 1, "partial_rollouts": partial}
        controller, engine = Simulation(lengths=lambda prompt, sample: 100, config=config).build()
        steps = await train(controller, 2, train_s=4.0)
        await controller.close()
        return steps, engine

    steps, engine = simulate(work())
    sample = steps[1].collected.groups[0].samples[0]
    np.testing.assert_array_equal(sample.response_token_ids, np.arange(100))
    assert sample.rollout_log_probs.tolist() == [-0.5] * 100
    assert sample.finish_reason == "stop"
    metrics = steps[1].collected.metrics
    assert metrics["rollout/requests_interrupted"] == 8
    if partial:
        assert sample.token_versions.tolist() == [0] * 40 + [1] * 60
        assert engine.begun_with["4:p4#0"] == [0, 40]
        assert (steps[1].got, metrics["rollout/response_tokens_discarded"]) == (20.0, 0)
        assert metrics["rollout/staleness_mean"] == 1.0
    else:
        assert sample.token_versions.tolist() == [1] * 100
        assert engine.begun_with["4:p4#0"] == [0, 0]
        assert (steps[1].got, metrics["rollout/response_tokens_discarded"]) == (24.0, 320)
        assert metrics["rollout/staleness_mean"] == 0.0


def test_without_over_sampling_a_batch_waits_for_groups_at_their_last_chance() -> None:
    # p0 of version 0 ends after 17 s; the first batch is full after 1 s, without it.
    simulation = Simulation(
        lengths=lambda prompt, sample: 170 if prompt == 0 else 10, config={"policy_lag": 1, "group_size": 2}
    )
    steps = simulate(run(simulation, 3, train_s=4.0, mode="retract"))
    assert [("p0" in batch) for batch in batches(steps)] == [False, True, False]
    assert [step.got for step in steps] == [1.0, 17.0, 21.0]
    assert all(step.collected.metrics["rollout/groups_cut"] == 0 for step in steps)
    spare = Simulation(
        lengths=lambda prompt, sample: 170 if prompt == 0 else 10,
        config={"policy_lag": 1, "group_size": 2, "over_sampling": 1.25},
    )
    steps = simulate(run(spare, 3, train_s=4.0, mode="retract"))
    assert [step.got for step in steps] == [1.0, 5.0, 9.0]
    assert [step.collected.metrics["rollout/groups_cut"] for step in steps] == [0, 1, 0]


def test_groups_that_have_become_too_old_are_refused_and_counted() -> None:
    async def work() -> Any:
        controller, _ = Simulation(config={"policy_lag": 1}).build()
        await train(controller, 1)
        # The trainer has gone on without a batch.
        await asyncio.sleep(5.0)
        for version in (2, 3):
            await controller.pause("abort")
            await controller.resume(version, ())
        collected = await controller.collect(4, 3)
        await controller.close()
        return collected

    collected = simulate(work())
    assert collected.metrics["rollout/groups_stale"] == 4
    assert ids(collected.groups) == ["p8", "p9", "p10", "p11"]


class Watch:
    """Looks on while a simulation runs, and lets things go wrong."""

    def __init__(self, controller: RolloutController, engine: SimulatedEngine, seed: int) -> None:
        self.controller, self.engine, self.draws = controller, engine, random.Random(seed)
        self.most_outstanding = 0

    async def disturb(self, every_s: float, times: int) -> None:
        for _ in range(times):
            await asyncio.sleep(every_s * self.draws.random())
            running = self.engine.running
            chosen = self.draws.sample(running, min(len(running), 2))
            (self.engine.crash if self.draws.random() < 0.7 else self.engine.break_off)(chosen)

    async def look(self) -> None:
        while True:
            self.most_outstanding = max(self.most_outstanding, len(self.controller.ledger.open))
            await asyncio.sleep(0.25)


SCHEDULES = st.fixed_dictionaries(
    {
        "policy_lag": st.integers(0, 3),
        "over_sampling": st.sampled_from([1.0, 1.3, 2.0]),
        "partial_rollouts": st.booleans(),
        "carry_over_max_lag": st.integers(0, 1),
        "max_requests_in_flight": st.sampled_from([3, 7, 4096]),
        "num_prompts_per_step": st.integers(1, 5),
        "group_size": st.integers(2, 3),
        "max_generation_rounds": st.just(50),
    }
)


@settings(max_examples=30, deadline=None)
@given(
    config=SCHEDULES,
    mode=st.sampled_from(["abort", "retract", "in_place"]),
    seed=st.integers(0, 1000),
    train_s=st.sampled_from([0.0, 3.0, 20.0]),
    scoring_s=st.sampled_from([0.0, 2.0]),
    disturbed=st.booleans(),
)
def test_no_schedule_breaks_a_bound_or_loses_a_prompt(
    config: dict[str, Any], mode: Any, seed: int, train_s: float, scoring_s: float, disturbed: bool
) -> None:
    config = config | {"partial_rollouts": config["partial_rollouts"] and config["policy_lag"] > 0}
    config |= {"sglang": SglangConfig(max_attempts=20)}

    def length(prompt: int, sample: int) -> int:
        # Now and then ten times as long.
        draws = random.Random(f"{seed} {prompt} {sample}")
        return draws.randint(1, 60) * (10 if draws.random() < 0.1 else 1)

    def answer(prompt: int) -> str:
        return random.Random(f"{seed} {prompt}").choices(["signal", "none", "broken"], [8, 3, 1])[0]

    async def work() -> tuple[list[Step], Watch, Counter[str]]:
        controller, engine = Simulation(length, answer, scoring_s, config=config).build()
        watch = Watch(controller, engine, seed)
        tasks = [asyncio.create_task(watch.look())]
        if disturbed:
            tasks.append(asyncio.create_task(watch.disturb(5.0, 15)))
        steps = await train(controller, 5, train_s, sync_s=0.5, mode=mode)
        for task in tasks:
            task.cancel()
        num_drawn = controller.ledger.num_drawn
        open_prompts = steps[-1].collected.open_prompts
        await controller.close()
        assert not controller.ledger.open
        assert engine.num_in_flight == 0
        assert sum(controller.ledger.counts.values()) == num_drawn
        assert {each.number for each in open_prompts if each.number is not None} <= {
            each.number for each in controller.ledger.settled
        }
        return steps, watch, controller.ledger.counts

    steps, watch, counts = simulate(work())
    wanted, lag, size = config["num_prompts_per_step"], config["policy_lag"], config["group_size"]
    used = [(step, group) for step, group in used_groups(steps)]
    # Every prompt once, every response whole, every group within its lag.
    names = [group.prompt.id for _, group in used]
    assert len(set(names)) == len(names) == 5 * wanted == counts["used"]
    for step, group in used:
        assert [sample.sample_index for sample in group.samples] == list(range(size))
        for sample in group.samples:
            whole = np.arange(length(number_of(group.prompt.id), sample.sample_index))
            np.testing.assert_array_equal(sample.response_token_ids, whole)
            versions = sample.token_versions
            assert len(versions) == len(whole) and (np.diff(versions) >= 0).all()
            assert versions[0] == sample.policy_version and versions[-1] <= step.version
            assert step.version - sample.policy_version <= max(lag, config["carry_over_max_lag"])
    # What each step says of its prompts adds up to what the ledger says.
    fates = Counter(each.fate for step in steps for each in step.collected.settled)
    assert fates <= counts
    for step in steps:
        check_staleness(step)
    assert watch.engine.most_in_flight <= config["max_requests_in_flight"]
    allowed = int(np.ceil(wanted * (lag + 1) * config["over_sampling"])) + wanted * (lag + 1)
    set_aside = max(step.collected.metrics["rollout/groups_generated"] for step in steps)
    assert watch.most_outstanding <= allowed + set_aside


def check_staleness(step: Step) -> None:
    """The distribution that is told is that of the batch's groups and tokens."""
    metrics, groups = step.collected.metrics, step.collected.groups
    if "rollout/staleness_mean" not in metrics:
        return
    oldest = [min(int(sample.token_versions[0]) for sample in group.samples) for group in groups]
    tokens = [int(version) for group in groups for sample in group.samples for version in sample.token_versions]
    for kind, versions in (("staleness", oldest), ("token_staleness", tokens)):
        counts = Counter(step.version - version for version in versions)
        expected = {f"rollout/{kind}_{lag}_fraction": count / len(versions) for lag, count in counts.items()}
        told = {k: v for k, v in metrics.items() if k.startswith(f"rollout/{kind}_") and k.endswith("_fraction")}
        assert told == pytest.approx(expected)
        assert metrics[f"rollout/{kind}_max"] == max(counts)
        assert metrics[f"rollout/{kind}_mean"] == pytest.approx(
            sum(lag * n for lag, n in counts.items()) / len(versions)
        )


def test_requests_in_flight_and_responses_that_wait_for_their_score_are_bounded() -> None:
    async def work() -> tuple[int, int]:
        config = {"policy_lag": 2, "max_requests_in_flight": 5, "over_sampling": 2.0}
        controller, engine = Simulation(scoring_s=30.0, config=config).build()
        await train(controller, 2)
        await controller.close()
        return engine.most_in_flight, controller.scoring.pool.most_waiting

    in_flight, waiting = simulate(work())
    assert in_flight == 5
    assert 5 <= waiting <= 10


def test_prompts_that_no_server_has_begun_come_first_in_the_next_batch() -> None:
    config = {"over_sampling": 2.0, "max_requests_in_flight": 4}
    steps = simulate(run(Simulation(config=config), 2))
    # Two groups at a time: when p2 and p3 have ended, p4 and p5 have just begun.
    assert batches(steps) == [["p0", "p1", "p2", "p3"], ["p6", "p7", "p8", "p9"]]
    metrics = steps[0].collected.metrics
    assert (metrics["rollout/groups_cut"], metrics["rollout/groups_returned"]) == (2, 2)
    waiting = [(each.number, each.prompt.id) for each in steps[0].collected.open_prompts]
    assert waiting == [(None, "p6"), (None, "p7")]


def test_held_out_prompts_are_tried_with_the_current_weights_beside_training() -> None:
    prompts = [Prompt(id=f"p{900 + place}", token_ids=np.array([1], dtype=np.int32), text="") for place in range(3)]

    async def work() -> None:
        simulation = Simulation(
            lengths=lambda prompt, sample: 50 if prompt >= 900 else 100, config={"policy_lag": 1, "over_sampling": 2.0}
        )
        controller, engine = simulation.build()
        await train(controller, 2, train_s=4.0, mode="in_place")
        began, sent = now(), len(engine.log)
        groups = await controller.generate_groups(prompts, 2, "evaluation", SAMPLING)
        assert now() - began == 5.0
        assert ids(groups) == ["p900", "p901", "p902"]
        assert [sample.token_versions.tolist() for group in groups for sample in group.samples] == [[2] * 50] * 6
        # Each goes before training's, which uses the places that are left.
        first = [name for _, name in engine.log[sent : sent + 6]]
        assert all(name.startswith("evaluation 1:") for name in first)
        assert [name for time, name in engine.log[sent + 6 :] if time < now()]
        # Nothing of training was lost meanwhile, and nothing of evaluation counts as training.
        collected = await controller.collect(3, 2)
        assert not {group.prompt.id for group in collected.groups} & set(ids(groups))
        again = await controller.generate_groups(prompts, 2, "evaluation", SAMPLING)
        assert ids(again) == ids(groups)
        await controller.close()

    simulate(work())


def test_an_interrupted_held_out_response_begins_again() -> None:
    prompt = Prompt(id="p900", token_ids=np.array([1], dtype=np.int32), text="")

    async def work() -> list[RolloutGroup]:
        config = {"policy_lag": 1, "partial_rollouts": True}
        controller, engine = Simulation(lengths=lambda prompt, sample: 50, config=config).build()
        await controller.resume(4, ())
        asyncio.get_running_loop().call_later(
            2.0, lambda: engine.break_off([name for name in engine.running if "p900" in name])
        )
        groups = await controller.generate_groups([prompt], 2, "evaluation", SAMPLING)
        assert now() == 7.0
        await controller.close()
        return groups

    (group,) = simulate(work())
    assert [sample.token_versions.tolist() for sample in group.samples] == [[4] * 50] * 2


def test_no_signal_in_any_round_ends_the_run_with_the_reason() -> None:
    simulation = Simulation(answer_of=lambda prompt: "none", config={"max_generation_rounds": 3})
    with pytest.raises(
        NoSignalError, match=r"step 1: rollout.max_generation_rounds = 3: none of 12 groups had"
    ) as caught:
        simulate(run(simulation, 1))
    assert "'?' was answered '9 tokens'" in str(caught.value)


def test_after_the_last_round_the_batch_is_filled_up() -> None:
    simulation = Simulation(
        answer_of=lambda prompt: "signal" if prompt == 5 else "none", config={"max_generation_rounds": 2}
    )
    (step,) = simulate(run(simulation, 1))
    assert ids(step.collected.groups) == ["p5", "p0", "p1", "p2"]
    assert step.collected.metrics["rollout/groups_filled_up"] == 3
    assert step.collected.metrics["rollout/groups_generated"] == 8
    fates = Counter(each.fate for each in step.collected.settled)
    assert fates == {"used": 4, "no_signal": 4}


def test_a_batch_that_cannot_be_completed_ends_the_run_with_the_counts() -> None:
    simulation = Simulation(answer_of=lambda prompt: "broken", config={"max_generation_rounds": 2})
    with pytest.raises(RunError) as caught:
        simulate(run(simulation, 1))
    assert str(caught.value) == (
        "step 1: 4 of 4 groups are missing after 2 rounds of 8 groups: 0 were older than rollout.policy_lag = 0 "
        "allows, 8 had fewer than two responses with a reward; allow a greater lag or more rounds, or mend the reward"
    )


@pytest.mark.parametrize("lag", [0, 1])
def test_at_the_end_of_the_prompts_what_is_under_way_is_still_used(lag: int) -> None:
    async def work() -> list[list[str]]:
        controller, _ = Simulation(limit=10, config={"policy_lag": lag}).build()
        steps = await train(controller, 2, train_s=0.3)
        with pytest.raises(EndOfPrompts):
            await controller.collect(3, 2)
        await controller.close()
        assert controller.ledger.counts == {"used": 8, "returned": 2}
        return batches(steps)

    assert simulate(work()) == [["p0", "p1", "p2", "p3"], ["p4", "p5", "p6", "p7"]]


def test_closing_takes_everything_back_from_the_servers() -> None:
    async def work() -> None:
        controller, engine = Simulation(lengths=lambda prompt, sample: 500, config={"policy_lag": 1}).build()
        await controller.resume(0, ())
        waiting = asyncio.create_task(controller.collect(1, 0))
        await asyncio.sleep(3.0)
        assert engine.num_in_flight == 16
        await controller.close()
        assert (engine.num_in_flight, now()) == (0, 3.0)
        assert controller.ledger.counts == {"returned": 8}
        with pytest.raises(RunError, match="the rollout controller was closed"):
            await waiting
        assert asyncio.all_tasks() == {asyncio.current_task()}

    simulate(work())


def test_servers_that_break_off_a_request_again_and_again_end_the_run() -> None:
    async def work() -> None:
        controller, engine = Simulation(config={"sglang": SglangConfig(max_attempts=3)}).build()

        async def break_off() -> None:
            while True:
                await asyncio.sleep(0.5)
                engine.break_off([name for name in engine.running if name.startswith("2:p2#1")])

        breaking = asyncio.create_task(break_off())
        with pytest.raises(RunError, match=r"request 2:p2#1 was broken off 3 times by the servers"):
            await controller.collect(1, 0)
        breaking.cancel()
        await controller.close()

    simulate(work())


class Forgetful(SimulatedEngine):
    """Never gives one of its results."""

    def _end(self, name: str, reason: Any) -> None:
        if name == "1:p1#1":
            del self._running[name]
            self._unread += 1
            self._results.put_nowait(None)  # type: ignore[arg-type]
        else:
            super()._end(name, reason)

    async def stream(self) -> Any:
        async for result in super().stream():
            if result is not None:
                yield result


class Repeating(SimulatedEngine):
    """Gives every result twice."""

    async def stream(self) -> Any:
        async for result in super().stream():
            yield result
            yield result


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Forgetful, r"the engine lost 1 requests, 1:p1#1 first"),
        (Repeating, r"a result for 0:p0#0, which was not asked"),
    ],
)
def test_an_engine_that_loses_or_repeats_a_result_is_named(kind: type[SimulatedEngine], problem: str) -> None:
    async def work() -> None:
        controller, _ = Simulation(engine=kind).build()
        with pytest.raises(RuntimeError, match=problem):
            await controller.collect(1, 0)
        await controller.close()

    simulate(work())


def test_a_failing_engine_ends_the_run_with_its_error() -> None:
    class Failing(SimulatedEngine):
        async def submit(self, requests: Any) -> None:
            raise RunError("no server is left")

    async def work() -> None:
        controller, _ = Simulation(engine=Failing).build()
        with pytest.raises(RunError, match="no server is left"):
            await controller.collect(1, 0)
        with pytest.raises(RunError, match="no server is left"):
            await controller.generate_groups(
                [Prompt(id="p1", token_ids=np.array([1], dtype=np.int32), text="")], 2, "evaluation", SAMPLING
            )
        await controller.close()

    simulate(work())
