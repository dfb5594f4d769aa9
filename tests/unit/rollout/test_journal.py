import asyncio
import dataclasses
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.rollout.journal import (
    JournalEntry,
    JournalError,
    forget_journal,
    journal_path,
    read_journal,
    write_journal,
)
from megatron_fipo.rollout.ledger import OpenPrompt, Settled
from megatron_fipo.runtime.errors import BreakdownError
from megatron_fipo.types import Prompt, RolloutGroup, Sample
from tests.simulated_rollouts import Simulation


def prompt(name: str, **values: Any) -> Prompt:
    return Prompt(id=name, token_ids=np.arange(len(name), dtype=np.int32), text=f"{name}\n½ \ud800", **values)


def sample(name: str, index: int, length: int, **values: Any) -> Sample:
    return Sample(
        prompt_id=name,
        sample_index=index,
        response_token_ids=np.arange(length, dtype=np.int32) + index,
        rollout_log_probs=-np.arange(length, dtype=np.float32) / 3,
        finish_reason="length",
        policy_version=6,
        **values,
    )


@pytest.fixture
def entry() -> JournalEntry:
    metadata = {"entry": {(1, 2): [0.5, None]}, "task": "maze"}
    versions, experts = np.array([6, 6, 7], dtype=np.int32), np.arange(5 * 2 * 2, dtype=np.int16).reshape(5, 2, 2)
    groups = [
        RolloutGroup(
            prompt=prompt("one", answer="½", source="math"),
            samples=[
                sample("one", 0, 3, reward=0.1, score=1.0, reward_terms={"first": 0.1}, answer="1/2"),
                sample(
                    "one", 1, 3, reward=-1.0, policy_versions=versions, routed_experts=experts, response_text="\ud800x"
                ),
            ],
        ),
        RolloutGroup(prompt=prompt("three", metadata=metadata), samples=[sample("three", 2, 0), sample("three", 3, 1)]),
    ]
    return JournalEntry(
        step=12,
        policy_version=7,
        groups=groups,
        metrics={"rollout/wait_s": 0.1},
        stream_state={"sources": {"math": {"epoch": 1}}},
        num_drawn=11,
        settled=[Settled(3, "one", "used"), Settled(4, "two", "no_signal")],
        open_prompts=[OpenPrompt(9, prompt("four"), True), OpenPrompt(None, prompt("five"), False)],
    )


def plain(value: Any) -> Any:
    """The value with arrays as lists that tell their types, to compare."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) else value


def test_a_batch_comes_back_as_it_was(entry: JournalEntry, tmp_path: Path) -> None:
    path = journal_path(tmp_path / "journal", 12)
    write_journal(entry, path)
    assert [each.name for each in path.parent.iterdir()] == ["step_000012.npz"]
    assert plain(read_journal(path)) == plain(entry)


def test_experts_take_a_byte_each_where_that_is_enough(entry: JournalEntry, tmp_path: Path) -> None:
    experts = entry.groups[0].samples[1].routed_experts
    assert experts is not None
    for step, (last, size) in enumerate(((255, 1), (256, 2), (-1, 2))):
        experts[-1, -1, -1] = last
        path = journal_path(tmp_path, step)
        write_journal(entry, path)
        with np.load(path) as file:
            assert file["routed_experts_000001"].itemsize == size
        assert plain(read_journal(path)) == plain(entry)


@pytest.mark.parametrize(
    ("steps", "left"),
    [({"last": 0}, [1, 2, 4, 5]), ({"last": 3}, [4, 5]), ({"first": 2}, [1]), ({"first": 2, "last": 4}, [1, 5])],
)
def test_batches_are_forgotten(tmp_path: Path, steps: dict[str, int], left: list[int]) -> None:
    for step in (1, 2, 4, 5):
        journal_path(tmp_path, step).touch()
    forget_journal(tmp_path, **steps)
    assert sorted(tmp_path.iterdir()) == [journal_path(tmp_path, step) for step in left]


def test_a_damaged_file_is_named(entry: JournalEntry, tmp_path: Path) -> None:
    path = tmp_path / "step_000001.npz"
    with pytest.raises(JournalError, match=f"{path}: is missing"):
        read_journal(path)
    path.mkdir()
    with pytest.raises(JournalError, match=r"is something else \(Is a directory\)"):
        read_journal(path)
    path.rmdir()
    # Opened, but not read.
    path.symlink_to("/proc/self/mem")
    with pytest.raises(BreakdownError, match=r"cannot be read \(Input/output error\), so nobody knows"):
        read_journal(path)
    path.unlink()
    write_journal(entry, path)
    whole = path.read_bytes()
    for content in (b"", b"PK damaged", whole[:-100], whole.replace(b"math", b"mauh", 1)):
        path.write_bytes(content)
        with pytest.raises(JournalError, match=f"{path}: cannot be read as a journalled batch"):
            read_journal(path)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"format_version": np.int64(2)}, "format version 2; this release reads 1"),
    "no version": ({"format_version": None}, "format version None; this release reads 1"),
    "an array left out": ({"rewards": None}, "is not a journalled batch"),
    "tokens left out": ({"response_token_ids": np.zeros(2, dtype=np.int32)}, "is not a journalled batch"),
    "a response left out": ({"response_lengths": np.array([3, 4])}, "is not a journalled batch"),
    "one too many": (
        {"prompt_lengths": np.array([3, 5, 4, 4, 0])},
        r"is not a journalled batch \(ValueError: it has more arrays than groups\)",
    ),
    "no JSON": ({"content": np.zeros(3, dtype=np.uint8)}, "is not a journalled batch"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_arrays_that_are_no_batch_are_named(kind: str, entry: JournalEntry, tmp_path: Path) -> None:
    changes, problem = CHANGES[kind]
    path = tmp_path / "step_000001.npz"
    write_journal(entry, path)
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(JournalError, match=f"{path}: {problem}"):
        read_journal(path)


def test_nothing_is_unpickled(entry: JournalEntry, tmp_path: Path) -> None:
    path = tmp_path / "step_000001.npz"
    write_journal(entry, path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"rewards": np.array([object()])}))
    with pytest.raises(JournalError, match="cannot be read"):
        read_journal(path)


def test_a_served_batch_is_on_disk_before_it_is_handed_over(tmp_path: Path) -> None:
    async def work() -> None:
        controller, _ = Simulation(
            lengths=lambda prompt, sample: 1 + prompt % 2, config={"policy_lag": 1}, recipe={"journal": tmp_path}
        ).build()
        await controller.resume(0, ())
        rollout = await controller.next_rollout(1, 0)
        entry = read_journal(journal_path(tmp_path, 1))
        assert (entry.step, entry.policy_version) == (1, 0)
        responses = [sample.response_token_ids for group in entry.groups for sample in group.samples]
        np.testing.assert_array_equal(rollout.batch.token_ids[rollout.batch.response_mask], np.concatenate(responses))
        assert rollout.metrics.pop("perf/journal_s") > 0
        assert entry.metrics == rollout.metrics
        assert entry.stream_state == {"num_drawn": 8}
        used = {group.prompt.id for group in entry.groups}
        assert {each.prompt_id for each in entry.settled if each.fate == "used"} == used
        # What was drawn is in the batch, refused, or still open.
        accounted = [each.number for each in entry.settled] + [each.number for each in entry.open_prompts]
        assert sorted(accounted) == list(range(8))
        await controller.close()

    # In real time: the file is written by another thread.
    asyncio.run(work())


def test_a_batch_that_cannot_be_journalled_is_not_handed_over_and_leaves_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        controller, _ = Simulation(
            lengths=lambda prompt, sample: 1 + prompt % 2, config={"policy_lag": 1}, recipe={"journal": tmp_path}
        ).build()
        await controller.resume(0, ())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(JournalError, match=r"cannot be written \(File too large\); free some space"):
                await controller.next_rollout(1, 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []
        await controller.close()

    asyncio.run(work())
