"""How the loop saves a run, and how one that was stopped or killed goes on."""

import json
import logging
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fipo.config.algorithm_card import CARD_FILE, effective_algorithm
from megatron_fipo.config.load import CONFIG_FILE, dump_config
from megatron_fipo.conversion.model_files import MODEL_FOLDER
from megatron_fipo.parallel.agreement import on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.rollout.journal import forget_journal
from megatron_fipo.runtime.checkpoint_store import Checkpoint
from megatron_fipo.runtime.earlier_run import has_other_samples
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told, read_errors_told
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.trainer.checkpointing import Checkpointer
from megatron_fipo.trainer.state import Run, StepReport

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
"""Counters of the loop, in a checkpoint."""
CONTROLLER_FILE = "rollouts.npz"
"""State of the rollout controller, in a checkpoint."""


def restore_actor(run: Run) -> bool:
    """Bring the actor and the counters of a run whose directory has begun to its newest checkpoint; collective.

    Returns:
        Whether there is one.

    Raises:
        CheckpointError: Its checkpoints cannot be used; see `Checkpointer.restore`.
    """
    checkpoint = run.checkpointer.restore()
    progress = broadcast_json(on_main_rank(lambda: None if checkpoint is None else _read_progress(checkpoint)), 0)
    if progress is not None:
        run.finished_steps, run.policy_version = progress["finished_steps"], progress["policy_version"]
        run.safeguards.load_state_dict(progress["safeguards"])
        if (pending := progress["unreported"]) is not None:
            run.unreported = StepReport(**pending)
    return progress is not None


def restore_files(run: Run, has_checkpoint: bool, without_journal: bool) -> None:
    """Bring what generates, and the files of the run directory, to where the actor is; collective.

    Args:
        run: This rank's view.
        has_checkpoint: What `restore_actor` gave.
        without_journal: Whether the journal's later batches are of another configuration, which would have generated
            other samples.

    Raises:
        CheckpointError: The controller's state cannot be read.
        ConfigError: The prompts are others, or in another order.
        RunError: A file cannot be written.
    """
    if run.rollout is not None:
        folder = run.checkpointer.store.path(run.finished_steps)
        # A run that was killed before its first checkpoint under a new configuration has that in its directory already.
        anew = has_checkpoint and run.is_main and has_other_samples(run.config, folder / CONFIG_FILE)
        path = folder / CONTROLLER_FILE if has_checkpoint else None
        run.rollout.restore(run.finished_steps, path, anew, without_journal)
    on_main_rank(lambda: _forget_later(run, has_checkpoint))


def _forget_later(run: Run, has_checkpoint: bool) -> None:
    assert run.directory is not None, "rank 0 has it"
    if (
        run.finished_steps < run.config.num_steps
        and (aside := run.directory.set_export_aside(run.finished_steps)) is not None
    ):
        logger.warning("the run goes on, so its export is %s now", aside)
    if not has_checkpoint:
        logger.warning("%s has no checkpoint yet; the run begins anew", run.directory.path)
        run.directory.forget_after(-1)
        return
    if run.finished_steps < run.config.num_steps or run.unreported is not None:
        logger.info("going on after step %d of %d", run.finished_steps, run.config.num_steps)
    else:
        logger.info(
            "all %d steps are done (num_steps = %d); raise num_steps to go on", run.finished_steps, run.config.num_steps
        )
    run.directory.forget_after(run.finished_steps, has_metrics=run.unreported is None)


def begin_checkpoint(run: Run) -> None:
    """Copy the actor to host memory where a checkpoint is due, before its memory is given to anybody.

    Raises:
        CheckpointError: It cannot be written, and `checkpoint.on_failure` is "stop".
    """
    if run.checkpointer.is_due(run.finished_steps):
        with run.timer.phase("checkpoint"):
            run.checkpointer.begin(run.finished_steps)


def complete_checkpoint(run: Run) -> None:
    """Add to the checkpoint that has begun what is not the actor's, once the step is reported.

    Raises:
        CheckpointError: It cannot be written, and `checkpoint.on_failure` is "stop".
    """
    own = run.checkpointer
    if own.is_under_way:
        metrics_file = None if run.directory is None else run.directory.metrics_file
        with run.timer.phase("checkpoint"):
            own.complete(run.finished_steps, partial(_write_files, run), metrics_file)
            own.advance()
    _note_saved(run)


def _note_saved(run: Run) -> None:
    """What follows from the checkpoints that are on disk, on rank 0."""
    if run.directory is not None:
        # A file system that refuses is asked again after the next step.
        with suppress(OSError):
            _keep_in_mind(run.directory, run.checkpointer)


def _keep_in_mind(directory: RunDirectory, own: Checkpointer) -> None:
    """Remember that there is one, and forget batches that only damage to all of the newest would call for."""
    newest = own.store.steps()[-own.config.keep_last :]
    if newest and not directory.has_saved:
        directory.saved_file.touch()
    if len(newest) == own.config.keep_last:
        forget_journal(directory.journal, last=newest[0])


def save_now(run: Run) -> bool:
    """Write a checkpoint of the finished steps, where there is none, and wait until it is on disk.

    Returns:
        Whether there is one, or need not be.

    Raises:
        CheckpointError: It cannot be written, and `checkpoint.on_failure` is "stop".
        RunError: The run directory is gone, or another one.
    """
    own = run.checkpointer
    if not own.config.every_steps or not run.finished_steps:
        return True
    run.require_directory()
    if not own.has_begun(run.finished_steps):
        with run.timer.phase("checkpoint"):
            own.finish()
        # One that was being written may have failed just now.
        if own.saved_step == run.finished_steps:
            return True
        if run.rollout is not None:
            run.rollout.leave_devices()
        own.begin(run.finished_steps)
    complete_checkpoint(run)
    with run.timer.phase("checkpoint"):
        own.finish()
    _note_saved(run)
    return own.saved_step == run.finished_steps


def _write_files(run: Run, folder: Path) -> None:
    """Everything in a checkpoint but the actor; collective over all ranks."""
    if run.rollout is not None:
        run.rollout.save(folder / CONTROLLER_FILE)
    on_main_rank(lambda: _write_own_files(run, folder))


def _write_own_files(run: Run, folder: Path) -> None:
    progress = {
        "finished_steps": run.finished_steps,
        "policy_version": run.policy_version,
        "safeguards": run.safeguards.state_dict(),
        "unreported": None if run.unreported is None else asdict(run.unreported),
    }
    with disk_errors_told(folder, "cannot be written"):
        # Metrics of a skipped update may be NaN, which write_json would make null.
        (folder / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        if run.actor.train_step is not None:
            run.actor.bridge.write_model_files(folder / MODEL_FOLDER, DTYPES[run.config.model.dtype])
        (folder / CONFIG_FILE).write_text(dump_config(run.config), encoding="utf-8")
        (folder / CARD_FILE).write_text(effective_algorithm(run.config.algorithm) + "\n", encoding="utf-8")


def _read_progress(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.path / PROGRESS_FILE
    with read_errors_told(path):
        content = path.read_bytes()
    try:
        progress = json.loads(content)
        if progress["finished_steps"] != checkpoint.manifest.step:
            raise ValueError(f"it is of step {progress['finished_steps']}")
        if not isinstance(progress["policy_version"], int) or not isinstance(progress["safeguards"], dict):
            raise TypeError("policy_version or safeguards is something else")
        if progress["unreported"] is not None:
            StepReport(**progress["unreported"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not of a run's checkpoint ({type(error).__name__}: {error})") from error
    return dict(progress)
