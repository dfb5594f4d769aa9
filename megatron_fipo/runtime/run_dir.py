"""The run directory: resolved configuration, metrics, samples, logs."""

import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.config.load import CONFIG_FILE
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told, disk_way_out, read_errors_told
from megatron_fipo.runtime.files.json_files import append_lines, keep_lines, parse_line, read_whole_lines
from megatron_fipo.runtime.files.whole_file import whole_file
from megatron_fipo.runtime.run_lock import LOCK_FILE

logger = logging.getLogger(__name__)

BREAKDOWN_FILE = "last_breakdown"
"""In the run directory: the newest checkpoint's step when a rank last died or the run last hung, or -1."""

# What is there although no run has begun, where one ended while it was starting.
_BEFORE_RUN = frozenset({LOCK_FILE, BREAKDOWN_FILE, "logs"})
_BEFORE_RUN_PREFIXES = (f"{LOCK_FILE}.", f".{BREAKDOWN_FILE}.", f".{CONFIG_FILE}.")
_OF_STEP = re.compile(r"(?:rollout|step)_([0-9]+)(?:\..*)?")
_UNWRITTEN = "cannot be written"


def comes_before_run(name: str) -> bool:
    """Whether a file of this name may be in a directory in which nothing has begun."""
    return name in _BEFORE_RUN or name.startswith(_BEFORE_RUN_PREFIXES)


class RunDirectory:
    """Files of one run; written by rank 0 alone.

    Args:
        path: The directory.
        is_here: Whether it is still the one that the run holds, see `hold_run_directory`.
    """

    def __init__(self, path: Path, is_here: Callable[[], bool] = lambda: True) -> None:
        self.path, self._is_here = path, is_here

    @property
    def has_run(self) -> bool:
        """Whether a run has begun in it."""
        return self.config_file.is_file()

    @staticmethod
    def check(path: Path, may_have_run: bool = False) -> None:
        """Refuse a path that cannot become a run directory, without touching it.

        Args:
            path: The path.
            may_have_run: Whether it may be the directory of a run that has begun.

        Raises:
            ConfigError: It is a file, a directory that holds something else, or a place that this user may not write
                to; or its export is a link that leads nowhere.
        """
        is_run = False
        try:
            is_run = may_have_run and RunDirectory(path).has_run
            taken = path.exists() and not is_run and (not path.is_dir() or _holds_files(path))
            nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
            writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        except OSError:
            taken, writable = False, False
        require(
            not taken,
            field="output_dir",
            value=path,
            rule="must be a new or empty directory, or that of a run to go on with, and it is neither"
            if may_have_run
            else "must be a new or empty directory, and it is not",
            way_out="choose another directory or remove this one",
        )
        require(
            writable,
            field="output_dir",
            value=path,
            rule="must be a directory that this user may write to",
            way_out="choose another directory or mend its permissions",
        )
        if is_run:
            _require_no_dead_link(path, RunDirectory(path).export, ", so the model could not be exported at the end")

    @classmethod
    def begin(cls, path: Path, config_yaml: str) -> "RunDirectory":
        """Make the directory, where there is none, and write config.yaml.

        Raises:
            ConfigError: The directory cannot be made or written to.
        """
        directory = cls(path)
        if directory.has_run:
            directory.write(CONFIG_FILE, config_yaml)
            return directory
        try:
            path.mkdir(parents=True, exist_ok=True)
            with whole_file(directory.config_file) as file:
                file.write(config_yaml.encode())
        except OSError as error:
            raise ConfigError(
                field="output_dir",
                value=path,
                rule=f"must be a directory that can be made and written to ({error.strerror})",
                way_out=disk_way_out(error),
            ) from error
        return directory

    @property
    def last_step(self) -> int | None:
        """The last finished step that has its metrics; None where none has."""
        lines = _lines(self.metrics_file)
        # The line of a step that found no prompts has its evaluation alone.
        return max((line["step"] for line in lines if "rollout/reward_mean" in line), default=None)

    def check_lines(self) -> None:
        """Refuse metrics and samples that the run did not write; nothing is touched.

        Raises:
            ConfigError: A line is of no step, or a file is a link that leads nowhere.
            BreakdownError: A file cannot be read.
            RunError: Something else is in its place.
        """
        for path in (self.metrics_file, self.samples_file):
            _require_no_dead_link(self.path, path)
            with read_errors_told(path, RunError):
                strange = _foreign_line(path, may_tear_several=path == self.samples_file)
            require(
                strange is None,
                field="output_dir",
                value=self.path,
                rule=f"line {strange} of {path.name} is of no step, so the run did not write it",
                way_out="remove that line",
            )

    def _steps_without_metrics(self, last: int) -> list[int]:
        told = {line["step"] for line in _lines(self.metrics_file)}
        return [step for step in range(1, last + 1) if step not in told]

    def set_export_aside(self, finished_steps: int) -> Path | None:
        """Rename the export of the last step, because the run goes on; returns its new place, where there was one.

        Args:
            finished_steps: Steps of the checkpoint that it goes on from; the export may be of a later one.

        Raises:
            RunError: It cannot be renamed.
        """
        if not self.export.exists():
            return None
        name = f"export_step_{max(finished_steps, self.last_step or 0)}"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        aside = next(path for path in map(self.path.joinpath, names) if not os.path.lexists(path))
        with disk_errors_told(self.export, "cannot be renamed", RunError):
            self.export.rename(aside)
        return aside

    @classmethod
    def create(cls, path: Path, config_yaml: str) -> "RunDirectory":
        """Begin in a new or empty directory.

        Raises:
            ConfigError: See `check` and `begin`.
        """
        cls.check(path)
        return cls.begin(path, config_yaml)

    def forget_after(self, step: int, has_metrics: bool = True) -> None:
        """Leave nothing of later steps that would not be written again in its place; warn where metrics are missing.

        Their lines go out of metrics.jsonl and samples.jsonl, with any that a killed run left half; so do recorded
        rollouts, token records, evaluations, and weights that were on their way to servers. Dumps stay: they are of
        what happened.

        Args:
            step: The last step that stays.
            has_metrics: Whether its metrics stay too.

        Raises:
            RunError: The files cannot be written.
        """
        told = step if has_metrics else step - 1
        for path, last in ((self.metrics_file, told), (self.samples_file, step)):
            if path.exists():
                with disk_errors_told(path, _UNWRITTEN, RunError):
                    _keep_steps(path, last)
        for folder in (self.rollouts, self.tokens, self.evaluations):
            for path in folder.glob("*"):
                if (found := _OF_STEP.fullmatch(path.name)) and int(found[1]) > step:
                    with disk_errors_told(path, "cannot be removed", RunError):
                        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.weights, ignore_errors=True)
        if missing := self._steps_without_metrics(told):
            logger.warning(
                "%s has no line of %d of the %d steps that are done, from step %d on; it was removed or changed, and "
                "what is missing is not written again",
                self.metrics_file,
                len(missing),
                told,
                missing[0],
            )

    def remove_remnants(self) -> None:
        """Remove files that a killed run left half; before anything writes here."""
        for path in (*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")):
            # Folders are their writers' own.
            if path.is_file():
                with suppress(OSError):
                    path.unlink()

    def require_here(self) -> None:
        """Refuse to go on where somebody has removed the directory, or put another one in its place.

        Raises:
            RunError: That has happened.
        """
        if not self._is_here():
            raise RunError(
                f"{self.path}: was removed or replaced while the run was writing there; bring it back and start again, "
                "or begin anew"
            )

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file at the top of the directory.

        Raises:
            RunError: It cannot be written.
        """
        with disk_errors_told(self.path / name, _UNWRITTEN, RunError):
            with whole_file(self.path / name) as file:
                file.write(text.encode())

    @property
    def config_file(self) -> Path:
        """The resolved configuration; there as soon as a run has begun."""
        return self.path / CONFIG_FILE

    @property
    def saved_file(self) -> Path:
        """There as soon as a checkpoint has been complete."""
        return self.path / ".saved"

    @property
    def has_saved(self) -> bool:
        """Whether the run has had a whole checkpoint."""
        return self.saved_file.exists()

    @property
    def metrics_file(self) -> Path:
        """One object for each step."""
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        """Some samples of each step."""
        return self.path / "samples.jsonl"

    @property
    def tokens(self) -> Path:
        """Folder of token records."""
        return self.path / "tokens"

    @property
    def rollouts(self) -> Path:
        """Folder of recorded rollout batches."""
        return self.path / "rollouts"

    @property
    def servers(self) -> Path:
        """Folder of the servers' logs, and of the address that agents on rollout nodes look for."""
        return self.path / "servers"

    @property
    def journal(self) -> Path:
        """Folder of the batches that servers generated, written before they are used."""
        return self.path / "journal"

    @property
    def weights(self) -> Path:
        """Folder of weights on their way to servers."""
        return self.path / "weights"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def dumps(self) -> Path:
        """Folder of updates that are kept to be run again."""
        return self.path / "dumps"

    @property
    def export(self) -> Path:
        """Folder of the Hugging Face export."""
        return self.path / "export"

    @property
    def evaluations(self) -> Path:
        """Folder of what evaluations found."""
        return self.path / "evaluations"

    def evaluation(self, step: int) -> Path:
        """Folder of the evaluation after a step."""
        return self.evaluations / f"step_{step}"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; numbers that are not finite become null, at any depth.

        Raises:
            RunError: It cannot be written, or the directory is gone.
        """
        self.require_here()
        with disk_errors_told(self.metrics_file, _UNWRITTEN, RunError):
            append_lines(self.metrics_file, [metrics])

    def append_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to samples.jsonl.

        Raises:
            RunError: They cannot be written.
        """
        with disk_errors_told(self.samples_file, _UNWRITTEN, RunError):
            append_lines(self.samples_file, samples)


def _require_no_dead_link(directory: Path, path: Path, consequence: str = "") -> None:
    require(
        not path.is_symlink() or path.exists(),
        field="output_dir",
        value=directory,
        rule=f"{path} is a link that leads nowhere{consequence}",
        way_out="remove the link, or bring back what it leads to",
    )


def _holds_files(path: Path) -> bool:
    """Whether a directory holds anything but what is left of a run that ended before it began."""
    return not all(comes_before_run(each.name) for each in path.iterdir())


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_whole_lines(path)[0] if path.exists() else []


def _foreign_line(path: Path, may_tear_several: bool) -> int | None:
    """Number of the first line that no run wrote, where there is one.

    A crash leaves a line that is not whole, and nothing behind it, or more of the step whose lines were added at once.

    Args:
        path: The file.
        may_tear_several: Whether a step adds several lines.
    """
    if not path.exists():
        return None
    objects, ends = read_whole_lines(path)
    for number, line in enumerate(objects, start=1):
        if type(line.get("step")) is not int:
            return number
    with path.open("rb") as file:
        file.seek(ends[-1] if ends else 0)
        file.readline()
        behind = [line for line in file if line.strip()]
    steps = {whole.get("step") for line in behind if (whole := parse_line(line)) is not None}
    is_torn = len(steps) <= 1 if may_tear_several else not behind
    return None if is_torn else len(objects) + 1


def _keep_steps(path: Path, last: int) -> None:
    keep_lines(path, lambda line: line["step"] <= last)
