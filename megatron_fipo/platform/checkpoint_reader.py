"""Reads torch.distributed checkpoints without running what they pickle.

A checkpoint's index, `.metadata`, is a pickle, and PyTorch's own reader runs it. Its tensors are pickles, too, which
PyTorch reads with `weights_only`; objects beside tensors it would run again, and here they are refused.
"""

import dataclasses
import os
import pickle
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.disk_errors import read_errors_told

INDEX_FILE = ".metadata"

_DTYPES = [each for each in vars(torch).values() if isinstance(each, torch.dtype)]
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata")),
        *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(("torch", str(each).removeprefix("torch.")) for each in _DTYPES),
    }
)
# What a damaged or foreign pickle, or the zip archive around a tensor, can raise.
_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    UnicodeError,
    ValueError,
)


class _IndexUnpickler(pickle.Unpickler):
    """Builds what an index is made of and nothing else."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"{self.path} asks for {module}.{name}, which no index of a checkpoint needs; it may be an attempt to "
                "run code, and nothing of it was run: use a checkpoint from a source that you trust"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to {pid!r}")


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint: its tensors, their pieces, and where each piece lies.

    Raises:
        CheckpointError: It is missing or damaged, asks for a class that an index does not need, holds other things than
            tensors, or points out of the folder.
        BreakdownError: It cannot be read.
    """
    path = folder / INDEX_FILE
    with read_errors_told(path):
        try:
            with path.open("rb") as file:
                index = _IndexUnpickler(path, file).load()
            _check(index, folder)
        except CheckpointError:
            raise
        except _DAMAGE as error:
            raise CheckpointError(f"{path} cannot be read as a checkpoint's index ({error})") from error
    return index


def _check(index: Any, folder: Path) -> None:
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError("it is something else")
    for name, told in index.state_dict_metadata.items():
        if not isinstance(told, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
    for place, stored in index.storage_data.items():
        if not isinstance(stored, _StorageInfo) or stored.relative_path not in sizes:
            raise ValueError(f"{place.fqn} lies in no file of this folder")
        if not 0 <= stored.offset <= stored.offset + stored.length <= sizes[stored.relative_path]:
            raise ValueError(f"{place.fqn} lies outside of {stored.relative_path}, which may be truncated")


class CheckpointReader(FileSystemReader):
    """PyTorch's reader of a checkpoint's tensors, with an index that is read as `read_index` does.

    Args:
        folder: The checkpoint.
        index: Its index.
    """

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self.folder, self.index = folder, index

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The index that was given."""
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the plan's tensors.

        Raises:
            CheckpointError: A file is damaged, or a tensor asks for a class that tensors do not need.
            BreakdownError: One cannot be read.
        """
        items = defaultdict(list)
        for item in plan.items:
            assert item.type is LoadItemType.TENSOR, "the index holds tensors alone"
            items[self.storage_data[item.storage_index].relative_path].append(item)
        for name, own in items.items():
            with _damage_told(self.folder / name):
                super().read_data(dataclasses.replace(plan, items=own), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_tensor(self, name: str) -> Tensor:
        """A whole tensor, whatever pieces it was written in; beside it at most one piece is in memory.

        Raises:
            CheckpointError: A file is damaged, a piece is missing, or one asks for a class that tensors do not need.
            BreakdownError: One cannot be read.
        """
        told = self.index.state_dict_metadata[name]
        assert isinstance(told, TensorStorageMetadata), "the index holds tensors alone"
        if len(told.chunks) == 1 and told.chunks[0].sizes == told.size:
            return self._read_piece(name, told.chunks[0], told.properties.dtype)
        whole, filled = torch.empty(told.size, dtype=told.properties.dtype), 0
        for chunk in told.chunks:
            piece = self._read_piece(name, chunk, told.properties.dtype)
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place].copy_(piece)
            filled += piece.numel()
        if filled != whole.numel():
            raise CheckpointError(f"{self.folder / INDEX_FILE}: {name} has {filled} of {whole.numel()} elements")
        return whole

    def _read_piece(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        stored = self.index.storage_data.get(MetadataIndex(name, chunk.offsets))
        if stored is None:
            raise CheckpointError(f"{self.folder / INDEX_FILE}: a piece of {name} lies nowhere")
        path = self.folder / stored.relative_path
        with _damage_told(path):
            with path.open("rb", buffering=0) as file:
                view = self._slice_file(file, stored)
                piece: Tensor = torch.load(view, map_location="cpu", weights_only=True)
            if piece.shape != chunk.sizes or piece.dtype != dtype:
                raise ValueError(f"{name} has another shape or type than the index says")
        return piece


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """What reading a file of tensors raises; an error of the disk is no damage."""
    with read_errors_told(path):
        try:
            yield
        except _DAMAGE as error:
            raise CheckpointError(
                f"{path} holds a tensor that cannot be read ({_reason(error)}); nothing in it was run"
            ) from error


def _reason(error: Exception) -> str:
    """What PyTorch says in many lines, in one, without its advice to read the file in a way that runs what it holds."""
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL (\S+)", str(error))
        return f"it asks for {asked[1]}, which would have to be run" if asked else "it is something else than a tensor"
    return " ".join(str(error).split())
