"""Where the rollout controller stands between two steps, as a file of a checkpoint.

What servers hold of a request in flight is not in it: the response then goes on from what it had when the servers were
last paused, or begins anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fipo.rollout.journal import JournalEntry
from megatron_fipo.rollout.ledger import Settled
from megatron_fipo.rollout.plain_archive import Archive, read_archive, write_archive
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told
from megatron_fipo.types import Prompt, RolloutGroup

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class OpenDraw:
    """A prompt that was drawn and is in no batch yet.

    Attributes:
        number: The draw's.
        group: The prompt, with what there is of its samples. One whose finish reason is "abort" goes on from its
            tokens, and one whose reward is not a number waits to be scored.
        is_finished: Whether no sample is missing.
    """

    number: int
    group: RolloutGroup
    is_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """All that the next batches depend on.

    Attributes:
        stream_state: Where the prompt stream stands, from `PromptStream.state_dict`.
        num_drawn: How many prompts a served engine was given.
        settled: What became of prompts since the last batch.
        open_draws: Prompts that are in no batch yet. Of an engine that decodes in waves, the surplus.
        returned: Prompts that will be drawn again before the stream's.
        period: What has been counted since the last batch, by field of `Period`; None where nothing has.
    """

    stream_state: Mapping[str, Any]
    num_drawn: int = 0
    settled: Sequence[Settled] = ()
    open_draws: Sequence[OpenDraw] = ()
    returned: Sequence[Prompt] = ()
    period: Mapping[str, Any] | None = None

    def begun_anew(self) -> "ControllerState":
        """The state without what had been generated: under another configuration its prompts are answered anew."""
        draws = [
            OpenDraw(draw.number, RolloutGroup(prompt=draw.group.prompt, samples=[]), False) for draw in self.open_draws
        ]
        return replace(self, open_draws=draws, period=None)

    def after(self, entry: JournalEntry) -> "ControllerState":
        """The state after a later batch, which was used again from the journal.

        Of the draws that were still open then, those that were open before have what they had before.
        """
        before = {draw.number: draw for draw in self.open_draws}
        draws, returned = [], []
        for each in entry.open_prompts:
            if each.number is None:
                returned.append(each.prompt)
            elif each.number in before:
                draws.append(before[each.number])
            else:
                draws.append(OpenDraw(each.number, RolloutGroup(prompt=each.prompt, samples=[]), False))
        return ControllerState(
            stream_state=entry.stream_state, num_drawn=entry.num_drawn, open_draws=draws, returned=returned
        )


def write_controller_state(state: ControllerState, path: Path) -> None:
    """Write a state down; when this returns, it is on disk, complete.

    Raises:
        CheckpointError: It cannot be written.
    """
    told = {
        "stream_state": dict(state.stream_state),
        "num_drawn": state.num_drawn,
        "settled": [asdict(each) for each in state.settled],
        "period": state.period,
        "open_draws": [{"number": draw.number, "is_finished": draw.is_finished} for draw in state.open_draws],
    }
    groups = [draw.group for draw in state.open_draws]
    with disk_errors_told(path, "cannot be written"):
        write_archive(Archive(told=told, groups=groups, prompts=state.returned), path, FORMAT_VERSION)


def read_controller_state(path: Path) -> ControllerState:
    """Read a state.

    Raises:
        CheckpointError: The file is missing, damaged, or of another format version.
    """
    return read_archive(path, FORMAT_VERSION, "the state of a rollout controller", CheckpointError, _state)


def _state(archive: Archive) -> ControllerState:
    told = archive.told
    draws = [
        OpenDraw(each["number"], group, each["is_finished"])
        for each, group in zip(told["open_draws"], archive.groups, strict=True)
    ]
    return ControllerState(
        stream_state=told["stream_state"],
        num_drawn=told["num_drawn"],
        settled=[Settled(**each) for each in told["settled"]],
        open_draws=draws,
        returned=archive.prompts,
        period=told["period"],
    )
