"""Batches of served engines, written down before they are used: what servers gave once they will not give again."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.rollout.ledger import OpenPrompt, Settled
from megatron_fipo.rollout.plain_archive import Archive, read_archive, write_archive
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told
from megatron_fipo.types import RolloutGroup

FORMAT_VERSION = 1

_NAME = re.compile(r"step_([0-9]{6,})\.npz")


class JournalError(RunError):
    """A journalled batch that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """All of a batch.

    Attributes:
        step: The step that trains on it.
        policy_version: Version of the weights that it trains.
        groups: Its groups, in order.
        metrics: Counters of its rollout.
        stream_state: Where the prompt stream stands, from `PromptStream.state_dict`.
        num_drawn: How many prompts have been drawn so far.
        settled: What became of prompts since the batch before.
        open_prompts: Prompts drawn from the stream that have come to no end yet.
    """

    step: int
    policy_version: int
    groups: Sequence[RolloutGroup]
    metrics: Mapping[str, float]
    stream_state: Mapping[str, Any]
    num_drawn: int
    settled: Sequence[Settled]
    open_prompts: Sequence[OpenPrompt]


def journal_path(folder: Path, step: int) -> Path:
    """File of a step's batch."""
    return folder / f"step_{step:06d}.npz"


def write_journal(entry: JournalEntry, path: Path) -> None:
    """Write a batch down; when this returns, it is on disk, complete.

    Raises:
        JournalError: It cannot be written.
    """
    told = {
        "step": entry.step,
        "policy_version": entry.policy_version,
        "metrics": dict(entry.metrics),
        "stream_state": dict(entry.stream_state),
        "num_drawn": entry.num_drawn,
        "settled": [asdict(each) for each in entry.settled],
        "open": [{"number": each.number, "is_ready": each.is_ready} for each in entry.open_prompts],
    }
    prompts = [each.prompt for each in entry.open_prompts]
    with disk_errors_told(path, "cannot be written", JournalError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_archive(Archive(told=told, groups=entry.groups, prompts=prompts), path, FORMAT_VERSION)


def read_journal(path: Path) -> JournalEntry:
    """Read a batch.

    Raises:
        JournalError: The file is missing, damaged, or of another format version.
    """
    return read_archive(path, FORMAT_VERSION, "a journalled batch", JournalError, _entry)


def forget_journal(folder: Path, first: int = 0, last: int | None = None) -> None:
    """Remove the batches of some steps.

    Args:
        folder: The journal.
        first: First step of those.
        last: Last step of those; None where all later ones go.
    """
    for path in folder.glob("step_*.npz"):
        if found := _NAME.fullmatch(path.name):
            step = int(found[1])
            if step >= first and (last is None or step <= last):
                path.unlink()


def _entry(archive: Archive) -> JournalEntry:
    told = archive.told
    open_prompts = [
        OpenPrompt(each["number"], prompt, each["is_ready"])
        for each, prompt in zip(told["open"], archive.prompts, strict=True)
    ]
    return JournalEntry(
        step=told["step"],
        policy_version=told["policy_version"],
        groups=archive.groups,
        metrics=told["metrics"],
        stream_state=told["stream_state"],
        num_drawn=told["num_drawn"],
        settled=[Settled(**each) for each in told["settled"]],
        open_prompts=open_prompts,
    )
