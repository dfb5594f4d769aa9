"""Writes the actor's folder of a checkpoint from whole tensors, one after the other, without a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.actor.checkpoint import STATE_FILE
from megatron_fipo.runtime.files.hashed_file import FileRecord, HashedFile
from megatron_fipo.runtime.files.json_files import write_json


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a whole tensor lies in a checkpoint, in plain values, so that ranks can tell each other.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Name of its type, such as "bfloat16".
        file: Name of the file.
        offset: First byte in it.
        length: Its bytes there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    length: int


def write_tensor_file(
    folder: Path, number: int, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[FileRecord, list[TensorPlace]]:
    """Write one of the files that tensors are in; on disk when this returns.

    Args:
        folder: The actor's folder.
        number: Number of the file.
        tensors: Names and whole tensors; each is let go of before the next is asked for.

    Returns:
        What the file is, and where its tensors are.

    Raises:
        OSError: It cannot be written.
    """
    places: list[TensorPlace] = []
    file_name = tensor_file_name(number)
    with HashedFile(folder / file_name) as file:
        for name, tensor in tensors:
            # Of a view, PyTorch writes all that it is a view of.
            whole = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            start = file.size
            torch.save(whole.contiguous(), cast(IO[bytes], file))
            dtype = str(tensor.dtype).removeprefix("torch.")
            places.append(TensorPlace(name, tuple(tensor.shape), dtype, file_name, start, file.size - start))
    return file.record, places


def tensor_file_name(number: int) -> str:
    """Name of a file of tensors."""
    return f"__{number}_0{DEFAULT_SUFFIX}"


def write_tensor_index(folder: Path, places: Iterable[TensorPlace]) -> None:
    """Add what makes the files a checkpoint of weights alone: any process grid loads it, without an optimizer.

    Args:
        folder: The actor's folder.
        places: Those of all files.

    Raises:
        OSError: It cannot be written.
    """
    told: dict[str, Any] = {}
    results: list[WriteResult] = []
    for place in places:
        size, offsets = torch.Size(place.shape), torch.Size([0] * len(place.shape))
        properties = TensorProperties(dtype=getattr(torch, place.dtype))
        told[place.name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(offsets, size)])
        stored = _StorageInfo(place.file, place.offset, place.length)
        results.append(WriteResult(MetadataIndex(place.name, offsets), place.length, stored))
    writer = _IndexWriter(folder)
    writer.finish(Metadata(told), [results])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    # No process grid wrote it, so none takes it for its own.
    write_json(folder / STATE_FILE, {"layout": {}})


class _IndexWriter(FileSystemWriter):
    """PyTorch's writer, for the index alone."""

    def storage_meta(self) -> StorageMeta:
        """Nothing that differs between two writes of the same tensors."""
        return StorageMeta()
