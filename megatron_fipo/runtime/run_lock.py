"""One run at a time in a run directory: a lock that the kernel lets go of when its holder dies, however it dies."""

import errno
import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.runtime.files.whole_file import whole_file

LOCK_FILE = ".lock"
"""The file in the run directory. It stays there between runs, and says who was the last to hold it."""

_HELD = frozenset({errno.EACCES, errno.EAGAIN})
# Slurm may start a job again before a file server has noticed that the node it ran on is dead.
_OWN_JOB_PATIENCE_S = 120.0
_BEAT_S = 5.0
_STALE_S = 60.0

type TakeLock = Callable[[IO[bytes]], None]


def _take_lock(file: IO[bytes]) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def hold_run_directory(path: Path, take_lock: TakeLock = _take_lock) -> Iterator[Callable[[], bool]]:
    """Keep other runs out of a run directory, which is made where there is none, until the context is left.

    The lock is POSIX's, which network file systems have too. It belongs to this process, not to its children, and would
    be lost with any other descriptor of the file that this process closes; nobody else opens it. Where a file system
    has no locks, the file's time of change says every few seconds that its holder lives.

    A job that Slurm has started again waits for its own earlier attempt. The context gives what tells whether the
    directory is still there: somebody may remove it, and another run begin in its place.

    Args:
        path: The run directory.
        take_lock: Locks an open file or raises OSError.

    Raises:
        ConfigError: Another run holds it, or the directory may not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0)
    except OSError as error:
        raise ConfigError(
            field="output_dir",
            value=path,
            rule=f"must be a directory that this user may write to ({error.strerror})",
            way_out="choose another directory or mend its permissions",
        ) from error
    with file:
        if _lock(path, file, take_lock):
            # A full disk takes no name, but the lock holds.
            with suppress(OSError):
                file.truncate(0)
                os.pwrite(file.fileno(), json.dumps(_own_name()).encode(), 0)
            yield _whether_here(path / LOCK_FILE)
        else:
            with _held_by_beats(path):
                yield _whether_here(path / LOCK_FILE)


def _whether_here(lock: Path) -> Callable[[], bool]:
    own = lock.stat()

    def is_here() -> bool:
        try:
            return os.path.samestat(own, lock.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            # The file system may be away for a while.
            return True

    return is_here


def check_unheld(path: Path) -> None:
    """Refuse a run directory that another run holds, without touching it; where there are no locks, nobody knows.

    The earlier attempt of a job that Slurm has started again counts for nobody.

    Raises:
        ConfigError: Another run holds it.
    """
    # Of the kind, from where, beginning, length (0 is all), holder.
    asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with suppress(OSError), (path / LOCK_FILE).open("rb") as file:
        kind, *_ = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
        holder = _read(file.read())
        if kind != fcntl.F_UNLCK and not _is_own_job(holder):
            raise _held(path, holder)


def _lock(path: Path, file: IO[bytes], take_lock: TakeLock) -> bool:
    """Lock the file; false where its file system has no locks."""
    patient_until = time.monotonic() + _OWN_JOB_PATIENCE_S
    while True:
        try:
            take_lock(file)
        except OSError as error:
            if error.errno not in _HELD:
                return False
            _wait_for(path, _read(os.pread(file.fileno(), 4096, 0)), patient_until)
        else:
            return True


def _wait_for(path: Path, holder: Mapping[str, Any], patient_until: float) -> None:
    """Wait a second for a holder, if it may be waited for."""
    if not _is_own_job(holder) or time.monotonic() > patient_until:
        raise _held(path, holder)
    time.sleep(1.0)


def _is_own_job(holder: Mapping[str, Any]) -> bool:
    return holder.get("job") is not None and holder["job"] == _own_name()["job"]


@contextmanager
def _held_by_beats(path: Path) -> Iterator[None]:
    """Hold a directory on a file system without locks: whoever's name stands in a fresh file holds it."""
    file, own = path / LOCK_FILE, _own_name()
    patient_until = time.monotonic() + _OWN_JOB_PATIENCE_S
    while (holder := _read(file.read_bytes())) and holder != own and _beats(path, holder):
        _wait_for(path, holder, patient_until)
    with whole_file(file, _private(file)) as partial:
        partial.write(json.dumps(own).encode())
    # Somebody else may be taking it too; the last one to write has it.
    time.sleep(1.0)
    if (other := _read(file.read_bytes())) != own:
        raise _held(path, other)
    ended = threading.Event()

    def is_own() -> bool:
        # The directory may have been replaced by another run's.
        return _read(file.read_bytes()) == own

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            # The file system may be away for a while.
            with suppress(OSError):
                if is_own():
                    os.utime(file)

    beating = threading.Thread(target=beat, name="run directory's holder", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            if is_own():
                file.write_bytes(b"")


def _private(file: Path) -> Path:
    """A name beside a file that is this process's alone."""
    return file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}")


def _beats(path: Path, holder: Mapping[str, Any]) -> bool:
    """Whether a holder lives, by the file system's own clock."""
    if holder.get("host") == socket.gethostname() and not Path(f"/proc/{holder.get('process')}").exists():
        return False
    probe = _private(path / LOCK_FILE)
    probe.touch()
    try:
        return probe.stat().st_mtime - (path / LOCK_FILE).stat().st_mtime < _STALE_S
    finally:
        probe.unlink()


def _own_name() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _read(content: bytes) -> dict[str, Any]:
    """Who a lock file names; nothing where it names nobody."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _held(path: Path, holder: Mapping[str, Any]) -> ConfigError:
    job = f" of Slurm job {holder['job']}" if holder.get("job") else ""
    name = f"process {holder.get('process', '?')} on {holder.get('host', '?')}{job}, since {holder.get('since', '?')}"
    end = f"scancel {holder['job']}" if holder.get("job") else "end that process"
    return ConfigError(
        field="output_dir",
        value=path,
        rule=f"another run holds this directory: {name}",
        way_out=f"wait for it, end it first ({end}), or choose another directory",
    )
