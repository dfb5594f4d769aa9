"""safetensors files written and read tensor by tensor: one tensor is in memory at a time, however large the file.

The library writes a file from all of its tensors together. Here the header, which follows from names, shapes and types
alone, comes first, and each tensor is written into its place.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config.base import ConfigError

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Bytes that are converted, hashed and written at a time.
_BLOCK_BYTES = 2**24
# The format's own limit.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that is to be written.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its type in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What a tensor is: two tensors with the same record are the same bit by bit.

    Attributes:
        shape: Its shape.
        dtype: Name of its type, as safetensors has it.
        sha256: SHA-256 of its bytes, in hexadecimal.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        path: The file.
        name: Its name.
        shape: Its shape.
        dtype_name: Its type, as safetensors has it.
        start: Its first byte in the file.
        num_bytes: Its bytes.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype_name: str
    start: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its type.

        Raises:
            ConfigError: It is none of weights that are trained, such as 8-bit ones.
        """
        if self.dtype_name not in _DTYPES:
            raise ConfigError(
                field=self.name,
                value=self.dtype_name,
                rule="is no type of weights that can be converted",
                way_out="choose a model folder with float32, float16 or bfloat16 weights",
            )
        return _DTYPES[self.dtype_name]

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        view = memoryview(_bytes_of(tensor.view(-1)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise EOFError(f"{self.path} ends inside {self.name}")
                view = view[count:]
        return tensor

    def record(self) -> TensorRecord:
        """What it is, read from the file block by block."""
        digest, left = hashlib.sha256(), self.num_bytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                block = file.read(min(left, _BLOCK_BYTES))
                if not block:
                    raise EOFError(f"{self.path} ends inside {self.name}")
                digest.update(block)
                left -= len(block)
        return TensorRecord(self.shape, self.dtype_name, digest.hexdigest())


def fault_of(found: TensorRecord, wanted: TensorRecord) -> str:
    """In what a tensor differs from what it must be; "" where it is the same bit by bit."""
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)}, not {list(wanted.shape)}"
    if found.dtype != wanted.dtype:
        return f"type {found.dtype}, not {wanted.dtype}"
    return "other bytes" if found.sha256 != wanted.sha256 else ""


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file, in the order of its header; the file was checked before (`check_weights`)."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        yield StoredTensor(path, name, tuple(entry["shape"]), entry["dtype"], 8 + size + first, last - first)


def record_of(tensor: Tensor, dtype: torch.dtype) -> TensorRecord:
    """What a tensor is in another type.

    Args:
        tensor: The tensor.
        dtype: The type.
    """
    digest = hashlib.sha256()
    for block in _blocks(tensor, dtype):
        digest.update(block)
    return TensorRecord(tuple(tensor.shape), DTYPE_NAMES[dtype], digest.hexdigest())


class SafetensorsWriter:
    """A new safetensors file that takes its tensors one by one, in any order; on disk when the block ends.

    Args:
        path: The file, which must not exist.
        tensors: All that it will hold.
    """

    def __init__(self, path: Path, tensors: Sequence[PlannedTensor]) -> None:
        self.path = path
        self._planned = {each.name: each for each in tensors}
        self._places: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for each in tensors:
            self._places[each.name] = end
            offsets = [end, end := end + each.num_bytes]
            header[each.name] = {
                "dtype": DTYPE_NAMES[each.dtype],
                "shape": list(each.shape),
                "data_offsets": offsets,
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        # Data begins at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        assert len(text) <= _LARGEST_HEADER, "a shard has too many tensors"
        self._header = struct.pack("<Q", len(text)) + text
        self.num_bytes = len(self._header) + end
        self._hasher = ThreadPoolExecutor(1)

    def __enter__(self) -> "SafetensorsWriter":
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            # A disk that is too small is told now, not in the midst.
            os.posix_fallocate(self._file, 0, self.num_bytes)
            self._write(self._header, 0)
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                assert not self._planned, f"{len(self._planned)} tensors were not written to {self.path}"
                os.fsync(self._file)
        finally:
            self._hasher.shutdown()
            os.close(self._file)

    def write(self, name: str, tensor: Tensor) -> TensorRecord:
        """Write a tensor, once, in the type that is planned.

        Args:
            name: Its name.
            tensor: Of the planned shape, and of any type.

        Returns:
            What it is, hashed before it went to the disk.
        """
        planned = self._planned.pop(name)
        assert tuple(tensor.shape) == planned.shape, f"{name} has shape {tuple(tensor.shape)}, not {planned.shape}"
        place, digest = len(self._header) + self._places[name], hashlib.sha256()
        for block in _blocks(tensor, planned.dtype):
            # Neither holds the interpreter, so that they take the time of one.
            hashed = self._hasher.submit(digest.update, block)
            self._write(block, place)
            hashed.result()
            place += len(block)
        return TensorRecord(planned.shape, DTYPE_NAMES[planned.dtype], digest.hexdigest())

    def _write(self, data: bytes | memoryview, place: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, place)
            view, place = view[count:], place + count


def _blocks(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in a type, a little at a time."""
    flat = tensor.detach().reshape(-1)
    # A row may stay a view of a matrix, as it lies there.
    flat = flat if flat.stride() == (1,) else flat.new_empty(len(flat)).copy_(flat)
    for block in flat.split(_BLOCK_BYTES // dtype.itemsize):
        yield memoryview(_bytes_of(block.to(dtype)))


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()
