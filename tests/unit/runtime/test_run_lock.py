"""A run directory has one run at a time; holders are processes of their own, which is what a lock belongs to."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.runtime import run_lock
from megatron_fipo.runtime.run_lock import LOCK_FILE, check_unheld, hold_run_directory

HOLDER = """
import errno, sys
from pathlib import Path
from megatron_fipo.runtime.run_lock import hold_run_directory


def no_locks(file):
    raise OSError(errno.ENOLCK, "no locks")

how = {"take_lock": no_locks} if sys.argv[2] == "beats" else {}
with hold_run_directory(Path(sys.argv[1]), **how):
    print("held", flush=True)
    sys.stdin.read()
"""


OTHER = '{"host": "elsewhere", "process": 1, "job": null, "since": "noon"}'


def no_locks(file: IO[bytes]) -> None:
    raise OSError(errno.ENOLCK, "no locks")


@contextmanager
def holder(folder: Path, kind: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the folder until its input ends."""
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"} | variables
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process


def hold(folder: Path, kind: str) -> None:
    with hold_run_directory(folder, **({"take_lock": no_locks} if kind == "beats" else {})):
        pass


@pytest.mark.parametrize("kind", ["locks", "beats"])
def test_a_second_run_is_refused_with_the_holder_named(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder, kind, SLURM_JOB_ID="77") as process:
        with pytest.raises(ConfigError) as refused:
            hold(folder, kind)
        text = str(refused.value)
        assert text.startswith(f"output_dir = {folder}: another run holds this directory: process {process.pid} on ")
        assert re.search(r" of Slurm job 77, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}; ", text)
        assert "(scancel 77)" in text
        assert process.poll() is None
    # It has ended in order.
    hold(folder, kind)


@pytest.mark.parametrize("kind", ["locks", "beats"])
def test_a_killed_holder_does_not_block(kind: str, tmp_path: Path) -> None:
    with holder(tmp_path, kind) as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).read_text(), "it could not tidy up"
    hold(tmp_path, kind)


def test_a_silent_holder_of_another_host_does_not_block_for_long(tmp_path: Path) -> None:
    lock = tmp_path / LOCK_FILE
    lock.write_text(OTHER)
    with pytest.raises(ConfigError, match="process 1 on elsewhere, since noon"):
        hold(tmp_path, "beats")
    os.utime(lock, (0, 0))
    hold(tmp_path, "beats")


def test_of_two_that_start_at_once_without_locks_the_last_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / LOCK_FILE
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: lock.write_text(OTHER))
    with pytest.raises(ConfigError, match="process 1 on elsewhere, since noon"):
        hold(tmp_path, "beats")
    assert lock.read_text() == OTHER


def test_starters_do_not_write_into_each_others_files(tmp_path: Path) -> None:
    # Of a process that is at it, by the name that other files have while they are written.
    other = tmp_path / f".{LOCK_FILE}.partial"
    other.write_text("half")
    hold(tmp_path, "beats")
    assert other.read_text() == "half"


def test_without_locks_too_a_directory_that_was_replaced_is_left_to_its_new_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, beats = tmp_path / LOCK_FILE, threading.Semaphore(0)
    monkeypatch.setattr(run_lock, "_BEAT_S", 0.001)
    with hold_run_directory(tmp_path, no_locks) as is_here:
        (tmp_path / "new").write_text(OTHER)
        os.utime(tmp_path / "new", (0, 0))
        (tmp_path / "new").rename(lock)
        read = run_lock._read
        monkeypatch.setattr(run_lock, "_read", lambda content: [read(content), beats.release()][0])
        # The second begins after the first is over.
        assert all(beats.acquire(timeout=60.0) for _ in range(2))
        assert not is_here()
    assert lock.read_text() == OTHER and lock.stat().st_mtime == 0


def test_a_job_that_is_started_again_waits_for_its_own_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    tries = 0

    def held_twice(file: IO[bytes]) -> None:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise OSError(errno.EAGAIN, "held")

    (tmp_path / LOCK_FILE).write_text('{"job": "78"}')
    with hold_run_directory(tmp_path, held_twice):
        assert tries == 3


def test_it_waits_where_there_are_no_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    lock = tmp_path / LOCK_FILE
    lock.write_text('{"host": "elsewhere", "process": 1, "job": "78"}')
    waited = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        os.utime(lock, (0, 0))

    monkeypatch.setattr(run_lock.time, "sleep", wait)
    hold(tmp_path, "beats")
    # For the holder, and to see that nobody else has taken it.
    assert len(waited) == 2


def test_whether_a_directory_is_held_is_told_without_touching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_unheld(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()
    with holder(tmp_path, "locks", SLURM_JOB_ID="79") as process:
        with pytest.raises(ConfigError, match=f"another run holds this directory: process {process.pid} on "):
            check_unheld(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "79")
        check_unheld(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    check_unheld(tmp_path)


def test_children_do_not_hold_the_directory(tmp_path: Path) -> None:
    """Else a grading process that outlives a killed run would keep its restart out."""
    script = HOLDER.replace('print("held", flush=True)', 'import os; os.fork() or __import__("time").sleep(600)')
    script = script.replace("sys.stdin.read()", 'print("held", flush=True); sys.stdin.read()')
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "locks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError):
            hold(tmp_path, "locks")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        hold(tmp_path, "locks")
        os.killpg(process.pid, signal.SIGKILL)


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a directory that this user may write to"):
        hold(tmp_path / "file" / "run", "locks")
