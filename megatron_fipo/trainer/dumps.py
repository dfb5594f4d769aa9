"""Updates kept with all that it takes to run them again, complete or absent as checkpoints are.

A dump is a folder `dumps/step_N` in the run directory: the rollout batch, what every rank had and computed of the
update, the weights and random states that it began with, configuration and numbers. Nothing in it is a pickle that is
run.
"""

import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fipo.actor.checkpoint import ActorCheckpoint, layout_of
from megatron_fipo.actor.random_states import random_states_of
from megatron_fipo.actor.train_step import Evidence, TrainStep, UpdateResult
from megatron_fipo.actor.update_arrays import packs, update_arrays
from megatron_fipo.config.load import CONFIG_FILE, dump_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import Arrays, broadcast_json, gather_json
from megatron_fipo.platform.device import uses_cuda
from megatron_fipo.rollout.batch import RecordedBatchError, load_batch, save_batch
from megatron_fipo.runtime.checkpoint_store import (
    Checkpoint,
    CheckpointStore,
    NewerFormatError,
    check_bytes,
    read_checkpoint,
)
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.array_files import ArrayFileError, read_arrays
from megatron_fipo.runtime.files.disk_errors import disk_errors_told, read_errors_told
from megatron_fipo.runtime.files.hashed_file import FileRecord, hash_file
from megatron_fipo.runtime.files.json_files import write_json
from megatron_fipo.runtime.files.whole_file import whole_file
from megatron_fipo.runtime.retention import Retention
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.types import TrainBatch

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DUMP_FILE = "dump.json"
BATCH_FILE = "batch.npz"
ACTOR_FOLDER = "actor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run stands with an update.

    Attributes:
        step: Its step.
        update: Which update of the step, from 1.
        num_updates: Updates of the step.
        policy_version: Version of the weights that its old log-probabilities are of.
        is_null: Whether no update of the rollout has been applied, so that the policy is still the old one.
    """

    step: int
    update: int
    num_updates: int
    policy_version: int
    is_null: bool

    def __str__(self) -> str:
        return f"step {self.step}, update {self.update} of {self.num_updates}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an update is kept.

    Attributes:
        kind: What is wrong with it; "" where it was asked for.
        text: Where and how.
        is_after_step: Whether it has already changed the weights, so that those from before it are gone.
    """

    kind: str
    text: str
    is_after_step: bool = False


class Dumps:
    """Writes the dumps of a run; every method is collective over all ranks.

    Args:
        config: The run.
        train_step: Takes its updates.
    """

    def __init__(self, config: RunConfig, train_step: TrainStep) -> None:
        self.config, self._train_step = config, train_step
        self.store = CheckpointStore(RunDirectory(config.output_dir).dumps, Retention(keep_last=sys.maxsize))
        self._written: dict[str, FileRecord] = {}
        self._last_step = 0

    def write(self, place: Place, fault: Fault, result: UpdateResult, batch: TrainBatch | None) -> str:
        """Keep the update that the train step has evidence of, unless one of the step has been kept.

        Args:
            place: Where the run stands.
            fault: Why.
            result: What the update gave.
            batch: The whole rollout batch, on rank 0.

        Returns:
            What to add to the text about the fault.
        """
        with random_states_of(self._evidence.random_states):
            is_begun = self.begin(place.step)
        if is_begun and self.complete(place, fault, result, batch):
            return f"; it is kept in {self.store.path(place.step)}"
        return ""

    def begin(self, step: int) -> bool:
        """Write weights and random states as they are now.

        Returns:
            False where an update of the step is kept, there are dumps enough, or it failed. What an earlier attempt
            kept of the step gives way.
        """
        if step == self._last_step:
            return False
        train_step, weights = self._train_step, None
        try:
            if not broadcast_json(on_main_rank(partial(self._has_room, step)), 0):
                return False
            if self.config.safeguards.dump_weights:
                weights = ActorCheckpoint(train_step.forward.chunks, None, train_step.context)
            num_bytes = 0 if weights is None else weights.num_bytes
            on_main_rank(partial(self._make_folder, step, num_bytes))
            files = {} if weights is None else weights.begin_save(self.store.partial(step) / ACTOR_FOLDER).finish()
            self._written = {f"{ACTOR_FOLDER}/{name}": record for name, record in files.items()}
        except CheckpointError as error:
            return self._failed(step, error)
        return True

    def complete(self, place: Place, fault: Fault, result: UpdateResult, batch: TrainBatch | None) -> bool:
        """Add the update to what `begin` wrote, and make a dump of it; false where that failed."""
        try:
            name, record = on_every_rank(partial(self._write_rank, place.step))
            files = {name: FileRecord(*record) for name, record in gather_json([name, [record.size, record.sha256]])}
            on_main_rank(partial(self._commit, place, fault, result, batch, files))
        except CheckpointError as error:
            return self._failed(place.step, error)
        self._last_step = place.step
        return True

    @property
    def _evidence(self) -> Evidence:
        evidence = self._train_step.evidence
        assert evidence is not None, "an update has been computed"
        return evidence

    def _has_room(self, step: int) -> bool:
        with disk_errors_told(self.store.folder, "cannot be read"):
            return len([each for each in self.store.steps() if each != step]) < self.config.safeguards.max_dumps

    def _make_folder(self, step: int, num_bytes: int) -> None:
        self.store.clean()
        folder = self.store.begin(step, num_bytes)
        with disk_errors_told(folder, "cannot be written"):
            (folder / ACTOR_FOLDER).mkdir()

    def _write_rank(self, step: int) -> tuple[str, FileRecord]:
        context, evidence = self._train_step.context, self._evidence
        path = rank_file(self.store.partial(step), context.rank)
        arrays = update_arrays(evidence, self._train_step.forward.routing)
        arrays["packs"] = np.frombuffer(json.dumps(packs(evidence)).encode(), dtype=np.uint8)
        with disk_errors_told(path, "cannot be written"):
            with whole_file(path) as file:
                np.savez(file, allow_pickle=False, **arrays)
            return path.name, hash_file(path)

    def _commit(
        self,
        place: Place,
        fault: Fault,
        result: UpdateResult,
        batch: TrainBatch | None,
        files: Mapping[str, FileRecord],
    ) -> None:
        assert batch is not None, "rank 0 has the batch"
        folder = self.store.partial(place.step)
        weights = "after" if fault.is_after_step else "before"
        told = {
            "format_version": FORMAT_VERSION,
            "place": asdict(place),
            "fault": {"kind": fault.kind, "text": fault.text},
            "weights": weights if self.config.safeguards.dump_weights else "none",
            "result": _told(asdict(result)),
            "machine": machine(),
        }
        with disk_errors_told(folder, "cannot be written"):
            save_batch(batch, folder / BATCH_FILE)
            (folder / CONFIG_FILE).write_text(dump_config(self.config), encoding="utf-8")
            write_json(folder / DUMP_FILE, told)
        self.store.commit(place.step, layout_of(self._train_step.context), {**self._written, **files})

    def _failed(self, step: int, error: CheckpointError) -> bool:
        """Go without it: what the dump is about matters more than the dump."""
        on_main_rank(lambda: self.store.abandon(step))
        if self._train_step.context.rank == 0:
            logger.warning("no dump of step %d: %s", step, error)
        return False


def rank_file(folder: Path, rank: int) -> Path:
    """File of a rank."""
    return folder / f"rank_{rank}.npz"


def machine() -> dict[str, Any]:
    """What bits depend on beside the process grid."""
    device = torch.cuda.get_device_name() if uses_cuda() else "cpu"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _told(value: Any) -> Any:
    """The value with texts for numbers that are not finite, which JSON does not know, at any depth."""
    if isinstance(value, Mapping):
        return {key: _told(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """A dump that has been read.

    Attributes:
        checkpoint: Its folder and manifest.
        place: Where the run stood.
        fault: Why it was written.
        weights: "before" the update, "after" it, or "none".
        result: What the update gave.
        machine: What it was computed on.
    """

    checkpoint: Checkpoint
    place: Place
    fault: Fault
    weights: str
    result: UpdateResult
    machine: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.checkpoint.path

    def check_bytes(self) -> None:
        """Compare every byte with what was written.

        Raises:
            CheckpointError: One differs.
        """
        check_bytes(self.path, self.checkpoint.manifest.files)

    def batch(self) -> TrainBatch:
        """The rollout batch.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            return load_batch(self.path / BATCH_FILE, demand_finite=False)
        except RecordedBatchError as error:
            raise CheckpointError(str(error)) from error

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return self.checkpoint.manifest.layout["world"]

    def rank_arrays(self, rank: int) -> Arrays:
        """Arrays of a rank; nothing is unpickled.

        Raises:
            CheckpointError: They are damaged.
            BreakdownError: They cannot be read.
        """
        path = rank_file(self.path, rank)
        try:
            with read_errors_told(path):
                return read_arrays(path)
        except ArrayFileError as error:
            raise CheckpointError(f"{path}: cannot be read as arrays of an update ({error})") from error


def read_dump(path: Path) -> Dump:
    """Read what a dump says of itself; its manifest, names and sizes are checked. Its folder may have any name.

    Raises:
        CheckpointError: It is missing, damaged, something else, or a later release wrote it.
        BreakdownError: It cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder")
    if not (path / DUMP_FILE).exists():
        raise CheckpointError(f"{path}: has no {DUMP_FILE}, so it is no dump of an update")
    checkpoint = read_checkpoint(path)
    try:
        told = json.loads((path / DUMP_FILE).read_bytes())
        version = told["format_version"]
        if version != FORMAT_VERSION:
            raise NewerFormatError(
                f"{path / DUMP_FILE}: format version {version}, and this release reads {FORMAT_VERSION}; use the "
                "release that wrote it"
            )
        result = told["result"]
        numbers = {name: float(result[name]) for name in ("loss", "denominator", "grad_norm", "learning_rate")}
        metrics = {key: float(value) for key, value in result["metrics"].items()}
        return Dump(
            checkpoint=checkpoint,
            place=Place(**told["place"]),
            fault=Fault(told["fault"]["kind"], told["fault"]["text"]),
            weights=told["weights"],
            result=UpdateResult(**(result | numbers | {"metrics": metrics})),
            machine=dict(told["machine"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / DUMP_FILE}: cannot be read ({error})") from error
