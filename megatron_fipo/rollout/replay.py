"""Batches that were journalled after the checkpoint that a run goes on from: they are used before new ones are made."""

import logging
from dataclasses import replace
from pathlib import Path

from megatron_fipo.rollout.controller_state import ControllerState
from megatron_fipo.rollout.journal import JournalEntry, JournalError, forget_journal, journal_path, read_journal

logger = logging.getLogger(__name__)


class JournalReplay:
    """Gives journalled batches, one a step, until there are no more.

    Args:
        folder: The journal.
        step: Steps that the checkpoint has finished.
        state: The controller's, of the checkpoint.
        num_groups: Groups of a batch.

    Attributes:
        state: The controller's after the batches that have been given.
    """

    def __init__(self, folder: Path, step: int, state: ControllerState, num_groups: int) -> None:
        self.state = state
        self._folder, self._step, self._num_groups = folder, step, num_groups
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether the next batch has to be made."""
        return self._is_over or not journal_path(self._folder, self._step + 1).exists()

    def end(self) -> ControllerState:
        """The controller's state from which new batches are made; what is left of the journal is of no use then."""
        forget_journal(self._folder, first=self._step + 1)
        return self.state

    def next(self, step: int, policy_version: int) -> JournalEntry | None:
        """The batch of a step; None where it has to be made, because there is none or it is unfit, which is told.

        Args:
            step: The step after the last one.
            policy_version: The trainer's.
        """
        if self.is_over:
            return None
        path = journal_path(self._folder, step)
        try:
            entry = read_journal(path)
            self._check(entry, path, step, policy_version)
        except JournalError as problem:
            logger.warning("step %d and those after it are generated anew: %s", step, problem)
            self._is_over = True
            return None
        self._step, self.state = step, self.state.after(replace(entry, groups=()))
        logger.info("step %d uses the batch that was generated for it before: %s", step, path)
        return entry

    def _check(self, entry: JournalEntry, path: Path, step: int, policy_version: int) -> None:
        found = {"step": entry.step, "policy version": entry.policy_version, "number of groups": len(entry.groups)}
        wanted = {"step": step, "policy version": policy_version, "number of groups": self._num_groups}
        for name, value in wanted.items():
            if found[name] != value:
                raise JournalError(f"{path}: its {name} is {found[name]} where {value} is wanted")
        # Where there is a checkpoint, other prompts have been refused already.
        if entry.stream_state.get("fingerprint") != self.state.stream_state.get("fingerprint"):
            raise JournalError(f"{path}: its prompts are of other data, or in another order")
