"""A controller that goes on where another one stood, in simulated time."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.rollout.batch_recipe import CollectedGroups
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.controller_state import (
    ControllerState,
    OpenDraw,
    read_controller_state,
    write_controller_state,
)
from megatron_fipo.rollout.journal import JournalEntry, journal_path, read_journal, write_journal
from megatron_fipo.rollout.ledger import OpenPrompt, Settled
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.types import RolloutGroup
from tests.simulated_rollouts import SimulatedEngine, Simulation, now, simulate
from tests.unit.rollout.test_journal import plain, prompt, sample


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    group = RolloutGroup(prompt=prompt("two"), samples=[sample("two", 1, 4, reward=0.5), sample("two", 0, 2)])
    state = ControllerState(
        stream_state={"sources": {"math": {"epoch": 1}}},
        num_drawn=9,
        settled=[Settled(3, "one", "stale")],
        open_draws=[OpenDraw(4, group, False), OpenDraw(8, RolloutGroup(prompt=prompt("x"), samples=[]), False)],
        returned=[prompt("again", answer="3")],
    )
    path = tmp_path / "rollouts.npz"
    write_controller_state(state, path)
    assert plain(read_controller_state(path)) == plain(state)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read as the state of a rollout controller"):
        read_controller_state(path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_controller_state(state, tmp_path / "none" / "rollouts.npz")


def entry(step: int, num_drawn: int, open_prompts: Sequence[OpenPrompt]) -> JournalEntry:
    return JournalEntry(
        step=step,
        policy_version=step,
        groups=[],
        metrics={},
        stream_state={"num_drawn": num_drawn},
        num_drawn=num_drawn,
        settled=[],
        open_prompts=open_prompts,
    )


def test_after_a_later_batch_what_is_still_open_has_what_it_had() -> None:
    half = OpenDraw(4, RolloutGroup(prompt=prompt("four"), samples=[sample("four", 1, 4)]), False)
    used = OpenDraw(3, RolloutGroup(prompt=prompt("three"), samples=[]), True)
    state = ControllerState(stream_state={"num_drawn": 5}, num_drawn=5, open_draws=[used, half])
    four, six, again = prompt("four"), prompt("six"), prompt("again")
    later = [OpenPrompt(4, four, True), OpenPrompt(6, six, False), OpenPrompt(None, again, False)]
    after = state.after(entry(2, 7, later))
    assert after.open_draws == [half, OpenDraw(6, RolloutGroup(prompt=six, samples=[]), False)]
    assert (after.stream_state, after.num_drawn) == ({"num_drawn": 7}, 7)
    assert [each.id for each in after.returned] == ["again"]


LAG = 2


def simulation(journal: Path | None) -> Simulation:
    return Simulation(
        lengths=lambda prompt, sample: 5 + 7 * (prompt % 5) + sample,
        config={"policy_lag": LAG, "num_prompts_per_step": 4, "over_sampling": 1.5, "partial_rollouts": True},
        recipe={"journal": journal},
    )


class Life:
    """One life of a run: batches, a sync after each, the state after each, until it is killed."""

    def __init__(self, journal: Path | None, step: int = 0, state: Path | None = None) -> None:
        self.controller, self.engine = simulation(journal).build()
        self.step = step
        self.states: dict[int, ControllerState] = {}
        self.batches: dict[int, list[RolloutGroup]] = {}
        self.settled: list[Settled] = []
        if state is not None:
            self.controller.restore(step, state)

    async def run_to(self, last: int, journal: Path) -> None:
        await self.controller.resume(self.step, ())
        for step in range(self.step + 1, last + 1):
            await self.controller.next_rollout(step, step - 1)
            self.batches[step] = list(read_journal(journal_path(journal, step)).groups)
            await asyncio.sleep(1.3)
            await self.controller.pause("abort")
            await self.controller.resume(step, ())
            # What the pause interrupted comes back.
            await asyncio.sleep(0.01)
            self.states[step] = self.controller.state()


def samples_of(groups: Sequence[RolloutGroup]) -> list[tuple[str, int, list[int]]]:
    return [
        (one.prompt_id, one.sample_index, one.response_token_ids.tolist()) for group in groups for one in group.samples
    ]


@pytest.mark.parametrize("saved", [0, 1, 3])
@pytest.mark.parametrize("killed", [3, 4])
def test_a_killed_run_goes_on_without_losing_or_repeating_a_draw(saved: int, killed: int, tmp_path: Path) -> None:
    """The checkpoint is of an earlier step than the journal's last batch; what the journal has is used again."""

    async def work() -> tuple[Life, Life]:
        first = Life(tmp_path)
        begin = first.controller.state()
        await first.run_to(killed, tmp_path)
        state = {0: begin, **first.states}[saved]
        path = tmp_path / "state.npz"
        write_controller_state(state, path)
        # Killed: nothing is closed, and the second begins with what is on disk.
        second = Life(tmp_path, saved, path)
        await second.run_to(8, tmp_path)
        await second.controller.close()
        await first.controller.close()
        return first, second

    first, second = simulate(work())
    for step in range(saved + 1, killed + 1):
        assert samples_of(second.batches[step]) == samples_of(first.batches[step]), "replayed"
    entries = [read_journal(journal_path(tmp_path, step)) for step in range(1, 9)]
    ends = Counter(each.number for each in (settled for one in entries for settled in one.settled))
    open_at_last = [each.number for each in entries[-1].open_prompts if each.number is not None]
    assert set(ends.values()) == {1}, "a draw ends once"
    assert sorted([*ends, *open_at_last]) == list(range(entries[-1].num_drawn)), "no draw is lost"
    prompts = [settled.prompt_id for one in entries for settled in one.settled if settled.fate != "returned"]
    assert len(set(prompts)) == len(prompts), "the stream gives every prompt once"
    for one in entries:
        assert all(one.policy_version - group_version(group) <= LAG for group in one.groups)


def group_version(group: RolloutGroup) -> int:
    return min(one.policy_version for one in group.samples)


def test_a_state_keeps_finished_groups_and_the_beginnings_of_others(tmp_path: Path) -> None:
    async def work() -> tuple[ControllerState, SimulatedEngine, RolloutController]:
        first = Life(tmp_path)
        await first.run_to(1, tmp_path)
        state = first.states[1]
        write_controller_state(state, tmp_path / "state.npz")
        second = Life(None, 1, tmp_path / "state.npz")
        started = now()
        await second.controller.resume(1, ())
        collected = await second.controller.collect(2, 1)
        assert now() - started < 4.0, "less than any group takes from its beginning"
        assert collected.groups
        await asyncio.sleep(0.1)
        await second.controller.close()
        await first.controller.close()
        return state, second.engine, second.controller

    state, engine, _ = simulate(work())
    finished = {draw.number for draw in state.open_draws if draw.is_finished}
    begun = {
        (draw.number, one.sample_index): len(one.response_token_ids)
        for draw in state.open_draws
        for one in draw.group.samples
        if one.finish_reason == "abort"
    }
    assert finished and begun
    asked = engine.begun_with
    assert not {name for name in asked if int(name.split(":")[0]) in finished}, "finished groups are not asked for"
    names = {draw.number: f"{draw.number}:{draw.group.prompt.id}" for draw in state.open_draws}
    sent = {place: asked[name] for place in begun if (name := f"{names[place[0]]}#{place[1]}") in asked}
    assert sent
    assert {place: tokens[0] for place, tokens in sent.items()} == {place: begun[place] for place in sent}


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def draw_from_other_prompts(path: Path) -> None:
    entry = read_journal(path)
    others = {**entry.stream_state, "fingerprint": {"data.train": ["math: other"]}}
    write_journal(dataclasses.replace(entry, stream_state=others), path)


@pytest.mark.parametrize("spoil", [damage, draw_from_other_prompts])
def test_an_unfit_batch_of_the_journal_is_told_and_made_anew(
    spoil: Callable[[Path], None], tmp_path: Path, caplog: Any
) -> None:
    async def work() -> tuple[Life, Life]:
        first = Life(tmp_path)
        await first.run_to(4, tmp_path)
        spoil(journal_path(tmp_path, 3))
        write_controller_state(first.states[1], tmp_path / "state.npz")
        second = Life(tmp_path, 1, tmp_path / "state.npz")
        assert journal_path(tmp_path, 4).exists()
        await second.run_to(3, tmp_path)
        assert not journal_path(tmp_path, 4).exists(), "it came after a batch that is another one now"
        await second.controller.close()
        await first.controller.close()
        return first, second

    first, second = simulate(work())
    assert samples_of(second.batches[2]) == samples_of(first.batches[2])
    assert "step 3 and those after it are generated anew" in caplog.text
    assert read_journal(journal_path(tmp_path, 3)).step == 3


def test_a_batch_that_is_given_up_while_it_is_handed_over_is_in_the_journal(tmp_path: Path) -> None:
    """A stop is asked for just then: the state that is saved has its groups no more."""

    async def work() -> tuple[ControllerState, list[JournalEntry]]:
        life = Life(tmp_path)
        await life.controller.resume(0, ())
        await life.controller.next_rollout(1, 0)
        asked = asyncio.create_task(life.controller.next_rollout(2, 0))
        while life.controller._journalling is None or life.controller._journalling.done():
            await asyncio.sleep(0)
        asked.cancel()
        await life.controller.save(tmp_path / "state.npz")
        await life.controller.close()
        entries = [read_journal(journal_path(tmp_path, step)) for step in (1, 2)]
        return read_controller_state(tmp_path / "state.npz"), entries

    # In real time: the journal is written by another thread.
    state, entries = asyncio.run(work())
    ended = [settled.number for one in entries for settled in one.settled]
    waiting = [draw.number for draw in state.open_draws] + [settled.number for settled in state.settled]
    assert sorted(ended + waiting) == list(range(state.num_drawn))


@pytest.mark.parametrize("rounds", [1, 10])
@pytest.mark.parametrize("answers", ["signal", "mixed"])
def test_a_batch_that_was_nearly_full_is_completed_as_it_would_have_been(
    rounds: int, answers: str, tmp_path: Path
) -> None:
    """A stop comes when one response is still under way: what is finished counts as it did."""

    def parts() -> Simulation:
        return Simulation(
            lengths=lambda prompt, sample: 500 if prompt == 3 else 5,
            answer_of=lambda prompt: "none" if answers == "mixed" and prompt == 1 else "signal",
            config={"num_prompts_per_step": 4, "max_generation_rounds": rounds},
        )

    async def work() -> tuple[CollectedGroups, CollectedGroups]:
        first, _ = parts().build()
        await first.resume(0, ())
        asked = asyncio.create_task(first.collect(1, 0))
        await asyncio.sleep(20.0)
        await first.save(tmp_path / "state.npz")
        second, _ = parts().build()
        second.restore(0, tmp_path / "state.npz")
        await second.resume(0, ())
        again = await second.collect(1, 0)
        whole = await asked
        for controller in (first, second):
            await controller.close()
        return whole, again

    whole, again = simulate(work())
    assert samples_of(again.groups) == samples_of(whole.groups)
    of_time = ("rollout/serving_s", "rollout/response_tokens_discarded", "rollout/wait_s")
    differing = {name for name in whole.metrics if whole.metrics[name] != again.metrics.get(name)}
    assert not {name for name in differing if not name.startswith(("perf/", *of_time))}


def test_under_another_configuration_prompts_are_answered_anew(tmp_path: Path) -> None:
    async def work() -> tuple[ControllerState, SimulatedEngine]:
        first = Life(tmp_path)
        await first.run_to(2, tmp_path)
        write_controller_state(first.states[1], tmp_path / "state.npz")
        second, engine = simulation(tmp_path).build()
        second.restore(1, tmp_path / "state.npz", anew=True, without_journal=True)
        assert not journal_path(tmp_path, 2).exists()
        await second.resume(1, ())
        await second.collect(2, 1)
        for controller in (first.controller, second):
            await controller.close()
        return first.states[1], engine

    state, engine = simulate(work())
    asked = {int(name.split(":")[0]) for name in engine.begun_with}
    assert {draw.number for draw in state.open_draws if draw.group.samples} <= asked
    assert {begun for times in engine.begun_with.values() for begun in times[:1]} == {0}
