"""Writes a rank's part of a checkpoint from host memory, in a thread, while training goes on.

megatron-core's writer keeps a process for its results, which a killed rank leaves behind. A thread ends with its rank,
and what it does (copying to a file, hashing, waiting for the disk) lets other threads run.
"""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.platform.device import uses_cuda
from megatron_fipo.platform.host_memory import CHUNK_BYTES
from megatron_fipo.runtime.files.hashed_file import FileRecord, HashedFile

_ALIGNMENT = 64


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class StagedTensors:
    """Host copies of tensors, allocated once and filled before each save.

    Args:
        tensors: What to copy; they must stay where they are.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sources = list(tensors)
        self.copies: list[Tensor] = []
        self.num_bytes = 0
        pending: list[Tensor] = []
        size = 0
        for tensor in self._sources:
            if pending and size + tensor.nbytes > CHUNK_BYTES:
                self._allocate(pending, size)
                pending, size = [], 0
            pending.append(tensor)
            size += _aligned(tensor.nbytes)
        self._allocate(pending, size)

    def _allocate(self, tensors: Sequence[Tensor], size: int) -> None:
        block = torch.empty(size, dtype=torch.uint8, pin_memory=uses_cuda()).numpy()
        self.num_bytes += size
        place = 0
        for tensor in tensors:
            # A storage of its own for each: of a view, PyTorch writes all that it is a view of.
            copy = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=place)
            self.copies.append(copy.view(tensor.shape))
            place += _aligned(tensor.nbytes)

    def fill(self) -> None:
        """Copy; when this returns, the copies are whole."""
        for source, copy in zip(self._sources, self.copies, strict=True):
            copy.copy_(source, non_blocking=True)
        if uses_cuda():
            torch.cuda.synchronize()


class StagedWriter(FileSystemWriter):
    """PyTorch's writer, which stages when it is asked to write, and writes in a thread afterwards.

    Args:
        folder: Where the file goes.
        rank: Global rank, for the name of its file.
    """

    # megatron-core's planner then makes every rank's plan on that rank.
    can_run_decentralized_global_plan = True

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self.folder, self.file_rank = folder, rank
        self.items: list[WriteItem] = []
        self.staged = StagedTensors([])
        self._results: list[WriteResult] = []
        self._files: dict[str, FileRecord] = {}
        self._problem = ""
        self._thread: threading.Thread | None = None

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: a disk that refuses is told by the thread, not in the midst of a collective."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is: the folder is made by who owns it."""
        return plan

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """The plan with the beginning of this rank's file name."""
        return dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{self.file_rank}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Allocate host memory for everything in the plan."""
        self.items = list(plan.items)
        tensors: list[Any] = [planner.resolve_data(item) for item in self.items]
        self.staged = StagedTensors([tensor.detach() for tensor in tensors])

    def storage_meta(self) -> StorageMeta:
        """Nothing that differs between two saves of the same state."""
        return StorageMeta()

    def begin(self, folder: Path) -> None:
        """Stage, then write in the background.

        Args:
            folder: Where the file goes.
        """
        assert self._thread is None, "one save at a time"
        self.staged.fill()
        self.folder = self.path = folder
        self._results, self._files, self._problem = [], {}, ""
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> tuple[str, list[WriteResult], dict[str, FileRecord]]:
        """Wait for the thread.

        Returns:
            What went wrong or "", where each tensor lies, and the files.
        """
        assert self._thread is not None, "nothing is being written"
        self._thread.join()
        self._thread = None
        return self._problem, self._results, self._files

    def _write(self) -> None:
        # The rank would otherwise take the end of its thread for success.
        try:
            self._write_file(f"__{self.file_rank}_0{DEFAULT_SUFFIX}")
        except OSError as error:
            self._problem = f"{self.folder} cannot be written: {error.strerror or error}"
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"

    def _write_file(self, name: str) -> None:
        if not self.items:
            return
        with HashedFile(self.folder / name) as file:
            for item, tensor in zip(self.items, self.staged.copies, strict=True):
                start = file.size
                torch.save(tensor, cast(IO[bytes], file))
                length = file.size - start
                self._results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        self._files[name] = file.record
