"""Files whose SHA-256 is known when they are written."""

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_BUFFERED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file was when it was written.

    Attributes:
        size: Its bytes.
        sha256: Their SHA-256, in hexadecimal.
    """

    size: int
    sha256: str


class HashedFile:
    """A new file that is hashed as it is written, and on disk when the block ends.

    An error of the disk leaves the block as itself, whatever the block made of it: PyTorch turns it into another.

    Args:
        path: The file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._hash = hashlib.sha256()
        self._error: OSError | None = None

    def __enter__(self) -> "HashedFile":
        self._file = self.path.open("xb", buffering=_BUFFERED_BYTES)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            # What is still buffered after an error could not be written either.
            with contextlib.suppress(OSError):
                self._file.close()
        if self._error is not None and error is not self._error:
            raise self._error

    def write(self, data: bytes | memoryview) -> int:
        """Add bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            self._error = self._error or error
            raise
        self._hash.update(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        """Nothing: the end of the block does."""

    @property
    def record(self) -> FileRecord:
        """What has been written so far."""
        return FileRecord(size=self.size, sha256=self._hash.hexdigest())


def hash_file(path: Path) -> FileRecord:
    """What a file is now.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


def hash_files(paths: list[Path]) -> list[FileRecord]:
    """What files are now; several are read at once.

    Raises:
        OSError: One cannot be read.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_file, paths))
