"""When a run's checkpoints are written, and what becomes of a failure: the actor's part and the store's, joined."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fipo.actor.checkpoint import ActorCheckpoint, PendingSave, layout_of
from megatron_fipo.config.base import require
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.runtime.checkpoint_store import Checkpoint, CheckpointStore, check_bytes
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told
from megatron_fipo.runtime.files.hashed_file import FileRecord
from megatron_fipo.runtime.retention import Retention

logger = logging.getLogger(__name__)

# The actor's folder in a checkpoint; the rest of the checkpoint is the trainer's.
ACTOR_FOLDER = "actor"
# Lines of metrics.jsonl are a few kilobytes; the newest ones lie within this.
_TAIL_BYTES = 2**22


@dataclass(slots=True)
class _Unfinished:
    """A checkpoint that is being written.

    Attributes:
        step: Finished steps.
        save: The actor's part; None in runs that do not train.
        has_files: Whether the trainer's own files are in it.
        score: See `Manifest`.
    """

    step: int
    save: PendingSave | None
    has_files: bool = False
    score: float | None = None


class Checkpointer:
    """Writes and reads a run's checkpoints; every method is collective over all ranks.

    Args:
        config: When, how and how many.
        context: This rank's place.
        actor: Saves and loads the actor; None in runs that do not train.
        folder: The run's checkpoints, on a file system that all nodes share.

    Attributes:
        saved_step: Step of the last checkpoint, if it is on disk or on its way there.
    """

    def __init__(
        self, config: CheckpointConfig, context: ParallelContext, actor: ActorCheckpoint | None, folder: Path
    ) -> None:
        self.config, self.context, self.actor = config, context, actor
        retention = Retention(
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
            best_metric=config.best_metric,
            highest_is_best=config.best_is == "highest",
        )
        self.store = CheckpointStore(folder, retention)
        self.saved_step: int | None = None
        self._unfinished: _Unfinished | None = None

    def restore(self) -> Checkpoint | None:
        """Bring the actor to the newest valid checkpoint.

        What killed saves left behind is removed, and damaged checkpoints of later steps are renamed.

        Returns:
            The checkpoint, on rank 0, whose other files the caller reads; None elsewhere, and where there is none.

        Raises:
            CheckpointError: It does not fit the actor, a later release wrote it, or there are only damaged ones.
        """
        on_main_rank(self._clean)
        before: int | None = None
        while True:
            checkpoint = on_main_rank(partial(self.store.newest_valid, check_hashes=False, before=before))
            manifest = None if checkpoint is None else checkpoint.manifest
            told = broadcast_json(None if manifest is None else [manifest.step, _listed(manifest.files)], 0)
            if told is None:
                return None
            step, files = told
            if not self._is_damaged(step, files):
                if self.actor is not None:
                    self.actor.load(self.store.path(step) / ACTOR_FOLDER)
                on_main_rank(partial(self._set_aside, step))
                self.saved_step = step
                return checkpoint
            before = step

    def _clean(self) -> None:
        for name in self.store.clean():
            logger.warning("removed %s, which a save that was killed left behind", self.store.folder / name)

    def _set_aside(self, step: int) -> None:
        for name in self.store.set_aside_after(step):
            logger.warning(
                "going on from step %d; a damaged checkpoint of a later step is now called %s, and stays until you "
                "remove it",
                step,
                name,
            )

    def _is_damaged(self, step: int, files: Sequence[Any]) -> bool:
        """Whether a file has other bytes than were written; every rank reads a share of them."""
        if not self.config.verify_on_load:
            return False
        context = self.context
        mine = {name: FileRecord(*record) for name, *record in files[context.rank :: context.world_size]}

        def problem_of_mine() -> str:
            try:
                check_bytes(self.store.path(step), mine)
            except CheckpointError as error:
                return str(error)
            return ""

        problems = [each for each in gather_json(on_every_rank(problem_of_mine)) if each]
        if problems and context.rank == 0:
            self.store.warn_of(step, "; ".join(problems))
        return bool(problems)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after a step."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def begin(self, step: int) -> None:
        """Begin a checkpoint with the actor, whose weights and optimizer are those after the step.

        When this returns, they are in host memory, and the actor may be trained, or moved off the device.

        Args:
            step: Finished steps.

        Raises:
            CheckpointError: It cannot be written, and `on_failure` is "stop".
        """
        self.finish()
        try:
            num_bytes = 0 if self.actor is None else self.actor.num_bytes
            on_main_rank(lambda: self._make_folder(step, num_bytes))
            save = None if self.actor is None else self.actor.begin_save(self.store.partial(step) / ACTOR_FOLDER)
        except CheckpointError as error:
            self._failed(step, error)
        else:
            self._unfinished = _Unfinished(step, save)

    def _make_folder(self, step: int, num_bytes: int) -> None:
        folder = self.store.begin(step, num_bytes)
        with disk_errors_told(folder, "cannot be written"):
            (folder / ACTOR_FOLDER).mkdir()

    @property
    def is_under_way(self) -> bool:
        """Whether a checkpoint has begun and is not complete."""
        return self._unfinished is not None

    def has_begun(self, step: int) -> bool:
        """Whether the checkpoint of a step waits for `complete`."""
        return self._unfinished is not None and self._unfinished.step == step and not self._unfinished.has_files

    def complete(self, step: int, write_files: Callable[[Path], None], metrics_file: Path | None = None) -> bool:
        """Add the trainer's own files to the checkpoint that has begun; wait until it is on disk, as configured.

        Args:
            step: Finished steps.
            write_files: Puts them into the folder that it is given; called on every rank, raises CheckpointError on
                every rank.
            metrics_file: metrics.jsonl, with the step's line in it; read on rank 0 for `keep_best`.

        Returns:
            Whether it is written or being written.

        Raises:
            CheckpointError: It cannot be written, and `on_failure` is "stop".
        """
        if not self.has_begun(step):
            return False
        unfinished = self._unfinished
        assert unfinished is not None
        try:
            write_files(self.store.partial(step))
        except CheckpointError as error:
            self._abandon(unfinished)
            return self._failed(step, error)
        unfinished.score, unfinished.has_files = self._score(metrics_file, step), True
        self.saved_step = step
        return self.config.asynchronous or self.finish()

    def _abandon(self, unfinished: _Unfinished) -> None:
        """Wait until no rank writes any more."""
        self._unfinished = None
        if unfinished.save is not None:
            with suppress(CheckpointError):
                unfinished.save.finish()

    def _score(self, metrics_file: Path | None, step: int) -> float | None:
        if self.config.keep_best == 0 or metrics_file is None:
            return None
        score = None
        # On this rank alone.
        with suppress(OSError):
            score = read_score(metrics_file, step, self.config.best_metric)
        if score is None:
            logger.info("step %d has no %s, so its checkpoint has no rank", step, self.config.best_metric)
        return score

    @property
    def is_written(self) -> bool:
        """Whether this rank writes nothing in the background; no rank talks to another."""
        return self._unfinished is None or self._unfinished.save is None or self._unfinished.save.is_done

    def advance(self) -> None:
        """Complete the save in the background, if all ranks have written their files; after every step.

        Raises:
            CheckpointError: It could not be written, and `on_failure` is "stop".
        """
        if self._unfinished is not None and self._unfinished.has_files and all(gather_json(self.is_written)):
            self.finish()

    def finish(self) -> bool:
        """Wait for the save in the background, and complete it; one that `complete` was not called for is given up.

        Returns:
            False where it failed.

        Raises:
            CheckpointError: It could not be written, and `on_failure` is "stop".
        """
        if self._unfinished is None:
            return True
        unfinished, self._unfinished = self._unfinished, None
        if not unfinished.has_files:
            self._abandon(unfinished)
            on_main_rank(lambda: self.store.abandon(unfinished.step))
            return False
        try:
            files = {} if unfinished.save is None else unfinished.save.finish()
            written = {f"{ACTOR_FOLDER}/{name}": record for name, record in files.items()}
            layout = layout_of(self.context)
            on_main_rank(lambda: self.store.commit(unfinished.step, layout, written, unfinished.score))
        except CheckpointError as error:
            return self._failed(unfinished.step, error)
        return True

    def _failed(self, step: int, error: CheckpointError) -> bool:
        if self.saved_step == step:
            self.saved_step = None
        on_main_rank(lambda: self.store.abandon(step))
        if self.config.on_failure == "stop":
            raise error
        if self.context.rank == 0:
            logger.warning("no checkpoint of step %d: %s", step, error)
        return False


def _listed(files: Mapping[str, FileRecord]) -> list[tuple[str, int, str]]:
    """Name, size and hash of each file, the large ones apart from each other."""
    by_size = sorted(files.items(), key=lambda each: -each[1].size)
    return [(name, record.size, record.sha256) for name, record in by_size]


def check_best_metric(config: CheckpointConfig) -> None:
    """Refuse to rank checkpoints by what no step has.

    Raises:
        ConfigError: `best_metric` is no metric.
    """
    require(
        not config.best_metric or not CATALOGUE.undeclared([config.best_metric]),
        field="checkpoint.best_metric",
        value=config.best_metric,
        rule="must be a metric, and no step has one of that name",
        way_out="docs/metrics.md has them all; eval/accuracy is a usual one",
    )


def read_score(metrics_file: Path, step: int, metric: str) -> float | None:
    """A step's metric from the end of metrics.jsonl; None where it has none.

    Args:
        metrics_file: The file.
        step: The step.
        metric: Key of the metric.
    """
    with metrics_file.open("rb") as file:
        file.seek(max(0, metrics_file.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            told: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and told.get("step") == step and isinstance(told.get(metric), int | float):
            return float(told[metric])
    return None
