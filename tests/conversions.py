"""Checkpoints of tiny actors, as a run writes them, to be converted."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.actor.checkpoint import ActorCheckpoint, layout_of
from megatron_fipo.actor.model import unwrap
from megatron_fipo.conversion.bridge_import import import_bridge
from megatron_fipo.conversion.model_files import MODEL_FOLDER
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.runtime.checkpoint_store import write_manifest
from megatron_fipo.trainer.checkpointing import ACTOR_FOLDER
from tests.tiny_actors import TinyActor, folder_tensors, tiny_actor

# Ranks are forked: what is imported before, none of them has to import for itself.
import_bridge()


def save_checkpoint(actor: TinyActor, folder: Path, step: int = 3, dtype: str = "float32") -> None:
    """Write a complete checkpoint of weights, with the files that describe the model; collective over all ranks."""
    if dist.get_rank() == 0:
        (folder / ACTOR_FOLDER).mkdir(parents=True)
        actor.bridge.write_model_files(folder / MODEL_FOLDER, DTYPES[dtype])
    dist.barrier()
    files = ActorCheckpoint(actor.chunks, None, actor.context).begin_save(folder / ACTOR_FOLDER).finish()
    if dist.get_rank() == 0:
        written = {f"{ACTOR_FOLDER}/{name}": record for name, record in files.items()}
        write_manifest(folder, step, layout_of(actor.context), written)
    dist.barrier()


def write_checkpoint(
    model: Path, folder: Path, parallelism: Mapping[str, Any] | None = None, dtype: str = "float32", step: int = 3
) -> None:
    """Build an actor of a model folder on all ranks, and write its checkpoint."""
    with tiny_actor(model, dict(parallelism or {}), dtype=dtype) as actor:
        save_checkpoint(actor, folder, step, dtype)


def bridge_export(model: Path, dtype: str) -> dict[str, bytes]:
    """Bytes of megatron-bridge's own export of an actor, by name; on one rank."""
    with tiny_actor(model, dtype=dtype) as actor:
        return {name: tensor_bytes(tensor) for name, tensor in actor.bridge.export(unwrap(actor.chunks))}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Bytes of a folder's tensors by name, shapes and types in front."""
    return {name: tensor_bytes(tensor) for name, tensor in folder_tensors(folder).items()}


def tensor_bytes(tensor: Any) -> bytes:
    told = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return told + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def all_files(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a folder, by their path in it."""
    found = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
