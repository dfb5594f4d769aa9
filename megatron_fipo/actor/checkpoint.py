"""The actor in a folder: weights, optimizer, schedule and random states, for any process grid to read.

The folder is a torch.distributed checkpoint as megatron-core writes them: one file a rank, and the index `.metadata`.
What is not a tensor is in `state.json`, so that nothing there is a pickle that has to be run.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_fipo.actor.checkpoint_shards import OPTIMIZER_PREFIX, count_names, shards_to_read, shards_to_write
from megatron_fipo.actor.checkpoint_writer import StagedWriter
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.random_states import NUM_BYTES, pack_random_states, unpack_random_states
from megatron_fipo.parallel.agreement import on_every_rank
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.checkpoint_reader import CheckpointReader, read_index
from megatron_fipo.platform.host_memory import require_resident
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.hashed_file import FileRecord
from megatron_fipo.runtime.files.json_files import write_json

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
RANDOM_STATES = "random_states"
# An archive around each tensor, and its line in the index.
_BYTES_PER_TENSOR = 2048


def layout_of(context: ParallelContext) -> dict[str, int]:
    """Sizes of the process grid, which a checkpoint is named with."""
    return {
        "world": context.world_size,
        "tensor": context.tp_size,
        "pipeline": context.pp_size,
        "virtual_pipeline": context.vpp_size,
        "context": context.cp_size,
        "data": context.dp_size,
        "expert": context.groups.ep.size(),
        "expert_tensor": context.groups.expt_tp.size(),
    }


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every save of this actor has in common: where its tensors are and how they are cut.

    Attributes:
        writer: Holds the host memory.
        index: Index of the checkpoint, places in files left out; on rank 0 alone.
        random_states: Filled before every save.
        num_bytes: Size of a checkpoint, of all ranks.
    """

    writer: StagedWriter
    index: Metadata | None
    random_states: Tensor
    num_bytes: int


class ActorCheckpoint:
    """Saves the actor and loads it; every method is collective over all ranks.

    The host memory that a save needs is allocated with the first one and kept: as much as the rank's share of weights
    and optimizer state.

    Args:
        chunks: Model chunks of this rank, wrapped for data parallelism.
        optimizer: Its optimizer; None saves and loads weights alone.
        context: This rank's place.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: ActorOptimizer | None, context: ParallelContext) -> None:
        self.chunks, self.optimizer, self.context = list(chunks), optimizer, context
        self._plan: _Plan | None = None

    @property
    def num_bytes(self) -> int:
        """Size of a checkpoint, a little more than less.

        Raises:
            RunError: The actor is off the device.
        """
        return self._planned().num_bytes

    def begin_save(self, folder: Path) -> "PendingSave":
        """Copy everything to host memory, and begin to write it in the background.

        When this returns, the actor may be trained, or moved off the device. The save before must have been finished.

        Args:
            folder: An empty folder, which all ranks see.

        Raises:
            RunError: The actor is off the device.
        """
        plan = self._planned()
        plan.random_states.copy_(pack_random_states())
        plan.writer.begin(folder)
        return PendingSave(folder, plan.writer, plan.index, self._state())

    def load(self, folder: Path) -> None:
        """Bring the actor to a checkpoint's state.

        Random states are set where the process grid is the one that wrote them; else they stay as they are.

        Args:
            folder: What `begin_save` was given.

        Raises:
            CheckpointError: The checkpoint is damaged, or of another model; raised on every rank. The actor is then
                unfit for use where reading had begun.
            RunError: The actor is off the device.
        """
        self._require_resident()
        shards = shards_to_read(self.chunks, self.optimizer, self.context)
        random_states = _random_states(self.context)
        index, state = on_every_rank(lambda: (read_index(folder), _read_state(folder)))
        is_same_grid = state["layout"] == layout_of(self.context)
        names = self._count_names()
        on_every_rank(lambda: _check_fit(folder, index, shards, *names))
        if is_same_grid:
            shards.append(random_states)
        on_every_rank(lambda: _read(folder, index, shards))
        if self.optimizer is not None:
            self.optimizer.set_progress(state["optimizer_steps"], state["schedule_steps"])
        if is_same_grid:
            unpack_random_states(random_states.data.view(-1))
        elif self.context.rank == 0:
            logger.warning("%s was written by another process grid: random states begin anew", folder)

    def _planned(self) -> _Plan:
        self._require_resident()
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self) -> _Plan:
        random_states = _random_states(self.context)
        shards = [*shards_to_write(self.chunks, self.optimizer, self.context), random_states]
        num_bytes = sum(shard.data.nbytes + _BYTES_PER_TENSOR for shard in shards)
        writer = StagedWriter(Path(), self.context.rank)
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        (_, index, _), *_ = save_state_dict_async_plan(_by_name(shards), writer, planner=planner)
        if index is not None:
            # megatron-core keeps every rank's plan in the index, for a cache that is not used here.
            del index.all_local_plans
        return _Plan(writer, index, random_states.data.view(-1), sum(gather_json(num_bytes)))

    def _count_names(self) -> tuple[int, int]:
        """How many tensors the model has, and how many its optimizer, over all ranks."""
        shards = shards_to_write(self.chunks, self.optimizer, self.context)
        counts = gather_json([count_names(shards), count_names(shards, OPTIMIZER_PREFIX)])
        every, optimizer = (sum(column) for column in zip(*counts, strict=True))
        return every - optimizer, optimizer

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"layout": layout_of(self.context)}
        if self.optimizer is not None:
            # A rank without any weights of its own has counted no steps.
            steps = max(gather_json(self.optimizer.num_steps))
            state |= {"optimizer_steps": steps, "schedule_steps": self.optimizer.schedule.num_steps}
        return state

    def _require_resident(self) -> None:
        require_resident((each for chunk in self.chunks for each in chunk.parameters()), "the actor's weights")
        if self.optimizer is not None:
            require_resident(self.optimizer.state_tensors(), "the optimizer's states")


class PendingSave:
    """A save whose files are being written.

    Args:
        folder: Where.
        writer: Who writes.
        index: The index without places; on rank 0 alone.
        state: Content of state.json.
    """

    def __init__(self, folder: Path, writer: StagedWriter, index: Metadata | None, state: dict[str, Any]) -> None:
        self.folder, self._writer, self._index, self._state = folder, writer, index, state

    @property
    def is_done(self) -> bool:
        """Whether this rank has written its file, or failed to; no rank talks to another."""
        return self._writer.is_done

    def finish(self) -> dict[str, FileRecord]:
        """Wait for all ranks' files and add the index; collective, and quick once every rank is done.

        Returns:
            The ranks' files by name, on rank 0; elsewhere nothing.

        Raises:
            CheckpointError: A file could not be written; raised on every rank.
        """
        problem, results, files = self._writer.wait()
        told = gather_json([problem, {name: [record.size, record.sha256] for name, record in files.items()}])
        for rank, (each, _) in enumerate(told):
            if each:
                raise CheckpointError(f"rank {rank}: {each}")
        is_main = dist.get_rank() == 0
        places: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        dist.gather_object(results, places)
        if is_main:
            problem = self._write_index(places)
        problem = broadcast_json(problem, 0)
        if problem:
            raise CheckpointError(problem)
        return {name: FileRecord(*record) for _, files in told for name, record in files.items()} if is_main else {}

    def _write_index(self, places: Any) -> str:
        """Write what makes the files a checkpoint; returns why that cannot be, or ""."""
        assert self._index is not None, "rank 0 has the index"
        try:
            self._writer.finish(self._index, places)
            save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
            write_json(self.folder / STATE_FILE, self._state)
        except OSError as error:
            return f"{self.folder} cannot be written: {error.strerror or error}"
        return ""


def _random_states(context: ParallelContext) -> ShardedTensor:
    row = torch.empty(1, NUM_BYTES, dtype=torch.uint8)
    return ShardedTensor.from_rank_offsets(RANDOM_STATES, row, (0, context.rank, context.world_size))


def _by_name(shards: Sequence[ShardedTensor], is_loading: bool = False) -> dict[str, Any]:
    """The shards as torch.distributed's planners take them."""
    by_name: dict[str, list[Any]] = defaultdict(list)
    for shard in shards:
        by_name[shard.key].append(shard)
    tensors: dict[str, Any] = mcore_to_pyt_state_dict(by_name, is_loading)
    return tensors


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        if not isinstance(state, dict) or "layout" not in state:
            raise ValueError("it is something else")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    return state


def _check_fit(
    folder: Path, index: Metadata, shards: Sequence[ShardedTensor], num_weights: int, num_states: int
) -> None:
    """Refuse a checkpoint of another model.

    Args:
        folder: The checkpoint, for the message.
        index: Its index.
        shards: What is wanted of it.
        num_weights: Tensors that the model has.
        num_states: Tensors that its optimizer has; 0 to do without those of the checkpoint.
    """
    told = {name: each for name, each in index.state_dict_metadata.items() if name != RANDOM_STATES}
    way_out = "load it into the model that it was saved from, with the same model.path and model.dtype"
    for shard in shards:
        found = told.get(shard.key)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{folder} is of another model: it has no {shard.key}; {way_out}")
        # The vocabulary is padded for the tensor-parallel size.
        first = 1 if shard.allow_shape_mismatch else 0
        saved, wanted = tuple(found.size), tuple(shard.global_shape)
        if len(saved) != len(wanted) or saved[first:] != wanted[first:]:
            raise CheckpointError(
                f"{folder} is of another model: {shard.key} has shape {saved} there and {wanted} here; {way_out}"
            )
        if found.properties.dtype != shard.dtype:
            raise CheckpointError(
                f"{folder} is of another precision: {shard.key} is {found.properties.dtype} there and {shard.dtype} "
                f"here; {way_out}"
            )
    states = sum(name.startswith(OPTIMIZER_PREFIX) for name in told)
    for what, saved_count, count in (("weights", len(told) - states, num_weights), ("states", states, num_states)):
        if count and saved_count != count:
            raise CheckpointError(
                f"{folder} is of another model: it has {saved_count} tensors of {what} where this one has {count}; "
                f"{way_out}"
            )


def _read(folder: Path, index: Metadata, shards: Sequence[ShardedTensor]) -> None:
    """Fill the shards' tensors, in place."""
    tensors = _by_name(shards, is_loading=True)
    planner = MCoreLoadPlanner(
        allow_shape_mismatch_sharded_tensors={shard.key: shard for shard in shards if shard.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    reader = CheckpointReader(folder, index)
    # What torch.distributed.checkpoint.load does on one rank, without its warnings and its wrapping of errors.
    planner.set_up_planner(tensors, index, is_coordinator=False)
    reader.set_up_storage_reader(index, is_coordinator=False)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
