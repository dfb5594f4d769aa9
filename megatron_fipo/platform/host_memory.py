"""Device memory that is handed back for a while: contents go to pinned host memory, tensors keep their place.

A tensor is a view of a storage, and so are its slices. Emptying the storage frees the memory of all of them, and
filling it again makes all of them right, whoever holds them.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, UntypedStorage

from megatron_fipo.platform.device import compute_device, uses_cuda
from megatron_fipo.runtime.errors import RunError

# PyTorch rounds a pinned allocation up to a power of two; one of the whole size could take twice the memory.
CHUNK_BYTES = 2**28


class HostMemory:
    """A place on the host for the contents of storages, allocated once and used again.

    Args:
        chunk_bytes: Size of one allocation.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self._chunks: list[Tensor] = []
        self._away: list[tuple[UntypedStorage, int]] = []

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return sum(chunk.nbytes for chunk in self._chunks)

    @property
    def in_use(self) -> bool:
        """Whether something lies there that was taken and not given back."""
        return bool(self._away)

    def take(self, storages: Sequence[UntypedStorage]) -> int:
        """Copy storages to the host and empty them; until `give_back`, their tensors must not be touched.

        Args:
            storages: On the compute device, each once.

        Returns:
            Bytes freed.
        """
        assert not self._away, "what was taken before is given back first"
        away = [(storage, storage.nbytes()) for storage in storages]
        self._reserve(sum(size for _, size in away))
        for device, host in self._pieces(away):
            host.copy_(device, non_blocking=True)
        self._away = away
        return empty(storages)

    def give_back(self) -> int:
        """Fill the storages again with what they held; nothing where nothing was taken.

        Returns:
            Bytes allocated on the device.

        Raises:
            RunError: The device has not so much; everything stays on the host.
        """
        refill(self._away)
        for device, host in self._pieces(self._away):
            device.copy_(host, non_blocking=True)
        given, self._away = self._away, []
        return sum(size for _, size in given)

    def _pieces(self, away: Sequence[tuple[UntypedStorage, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same bytes on the device and on the host, cut where a chunk ends."""
        position = 0
        for storage, size in away:
            contents, start = _bytes(storage), 0
            while start < size:
                chunk, offset = divmod(position, self.chunk_bytes)
                count = min(size - start, self.chunk_bytes - offset)
                yield contents[start : start + count], self._chunks[chunk][offset : offset + count]
                start, position = start + count, position + count

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes <= self.num_bytes:
            return
        # Only the last chunk may be a smaller one.
        self._chunks = [chunk for chunk in self._chunks if chunk.nbytes == self.chunk_bytes]
        while (missing := num_bytes - self.num_bytes) > 0:
            size = min(missing, self.chunk_bytes)
            self._chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=uses_cuda()))


def storages_of(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The storages of tensors that are on the compute device, each once, empty tensors left out."""
    kind = compute_device().type
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.numel() and tensor.device.type == kind)
    return list({storage._cdata: storage for storage in storages}.values())


def empty(storages: Sequence[UntypedStorage]) -> int:
    """Free the memory of storages and hand it to the device's other processes; returns the bytes."""
    num_bytes = sum(storage.nbytes() for storage in storages)
    if uses_cuda():
        # Copies to the host may still run.
        torch.cuda.synchronize()
    for storage in storages:
        storage.resize_(0)
    if uses_cuda():
        torch.cuda.empty_cache()
    return num_bytes


def refill(storages: Sequence[tuple[UntypedStorage, int]]) -> None:
    """Give emptied storages their memory back, uninitialised.

    Args:
        storages: With the bytes that each had.

    Raises:
        RunError: The device has not so much; all of them stay empty.
    """
    try:
        for storage, size in storages:
            storage.resize_(size)
    except torch.OutOfMemoryError as error:
        for storage, _ in storages:
            storage.resize_(0)
        needed = sum(size for _, size in storages) / 1024**3
        raise RunError(
            f"the trainer needs {needed:.2f} GiB of GPU memory back, which servers on the same GPU were to release, "
            f"and cannot have them: {error}"
        ) from error


def require_resident(tensors: Iterable[Tensor], what: str) -> None:
    """Check that tensors have their memory: PyTorch itself would crash, or read what is another's.

    Args:
        tensors: What is about to be used.
        what: What they are, for the message.

    Raises:
        RunError: One of them has been emptied.
    """
    if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in tensors):
        raise RunError(
            f"{what} are not on the device: their memory was handed to the rollout engine, which shares it; restore "
            "them first (ActorMemory.restore)"
        )


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
