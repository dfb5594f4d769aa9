"""Runs whose processes are killed at chosen moments and started again as a user would, until they come to their end.

A life of a run is `megatron-fipo train CONFIG.yaml` on every rank, in processes that were forked from one that has
imported everything. They tell their phases through a pipe, and the moment of a kill is counted from there.
"""

import contextlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_fipo import cli
from megatron_fipo.runtime.files.hashed_file import HashedFile
from megatron_fipo.runtime.timing import PhaseTimer
from tests.marked_processes import MARK

type Victim = Literal[
    "rank 0", "rank 1", "reward worker", "controller", "server", "file", "writer", "asked 0", "asked 1"
]
"""Who is killed: a process at a moment of a phase; or "file", rank 0 at one of its operations on files of the run
directory; or "writer", a rank at a byte of its part of a checkpoint. "asked" ranks are asked to end, by SIGUSR1."""

START = "start"
_FILE_EVENTS = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"})
# What is left of a life ends by itself within this after a kill. In its first seconds, before the ranks have met, none
# can know of another's death: then it is ended here, as launchers do.
END_PATIENCE_S = 20.0
# A controller whose rank 0 is gone has this long to end its servers in good order, and then ends itself.
LAST_END_PATIENCE_S = 80.0
LIFE_PATIENCE_S = 300.0
# No line of the metrics has the time of an export, which comes after the last one; so long it takes with two ranks.
EXPORT_S = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A kill.

    Attributes:
        victim: Who.
        phase: The phase, by its name in the metrics, or "start" from the first moment; not of "file" and "writer".
        occurrence: Which of the phase's occurrences in this life, from 1.
        moment: Where in it, or in all file operations, or bytes, of a life, from 0 to 1.
    """

    victim: Victim
    phase: str = START
    occurrence: int = 1
    moment: float = 0.5


@dataclass(slots=True, kw_only=True)
class Life:
    """How a life ended.

    Attributes:
        kill: What was to happen.
        killed: Whether it did.
        statuses: How each rank ended; negative is the signal that ended it.
        seconds_to_end: How long the others took to end after the kill.
        left: Processes that were still there when they should have been gone, which had to be ended.
    """

    kill: Kill | None
    killed: bool = False
    statuses: list[int] = field(default_factory=list)
    seconds_to_end: float = 0.0
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What moments from 0 to 1 are of: an uninterrupted life's phases, file operations of rank 0 and bytes of a rank.

    Attributes:
        seconds: Mean duration of each phase.
        file_events: Operations.
        bytes_written: Bytes.
    """

    seconds: dict[str, float]
    file_events: int
    bytes_written: int


def live(
    words: Sequence[str], folder: Path, world_size: int, name: str, kill: Kill | None, scale: Scale | None
) -> Life:
    """Run one life.

    Args:
        words: What follows `megatron-fipo`.
        folder: The run directory; the ranks' output goes into files beside it.
        world_size: Ranks.
        name: Names the life in the files' names and in the marks of its processes.
        kill: Who is killed, and when.
        scale: Needed with a kill.
    """
    news, tell = os.pipe()
    port, mark = free_port(), f"{folder}.{name}"
    ranks = []
    for rank in range(world_size):
        process = os.fork()
        if process == 0:
            os.close(news)
            _be_rank(words, folder, rank, world_size, port, mark, kill, scale, tell)
        ranks.append(process)
    os.close(tell)
    life = Life(kill=kill)
    try:
        _watch(life, ranks, news, scale)
        life.statuses = _ended(life, ranks)
    finally:
        os.close(news)
        for process in ranks:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
    life.left += end_marked(mark)
    return life


def _watch(life: Life, ranks: list[int], news: int, scale: Scale | None) -> None:
    """Follow rank 0's phases, and kill where it is time."""
    kill = life.kill
    if kill is None or scale is None:
        return
    started, seen = time.monotonic(), ""
    wanted = 0 if kill.phase == START else kill.occurrence
    while time.monotonic() - started < LIFE_PATIENCE_S:
        is_ready = select.select([news], [], [], 0.2)[0] if wanted else []
        if is_ready:
            if not (told := os.read(news, 4096).decode()):
                return
            seen += told
        if not wanted or seen.split("\n")[:-1].count(kill.phase) >= wanted:
            if kill.victim in ("file", "writer"):
                # They look for the moment themselves.
                wanted = 1 << 30
                continue
            time.sleep(kill.moment * scale.seconds.get(kill.phase, 1.0))
            life.killed = _kill(kill.victim, ranks)
            return


def _kill(victim: Victim, ranks: list[int]) -> bool:
    """Kill somebody, if there is such a process."""
    kind, _, number = victim.partition(" ")
    if kind in ("rank", "asked"):
        process = ranks[int(number)]
        if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return False
        os.kill(process, signal.SIGKILL if kind == "rank" else signal.SIGUSR1)
        return True
    title = {
        "controller": "controller_process",
        "server": "sglang::scheduler",
        "reward worker": "megatron_fipo.rewards.worker",
    }[victim]
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(ranks[0]).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    return True
    return False


def _ended(life: Life, ranks: list[int]) -> list[int]:
    """Wait for all ranks; those that do not end are ended and named."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + LIFE_PATIENCE_S
    first_end: float | None = None
    while len(statuses) < len(ranks):
        for rank, process in enumerate(ranks):
            if rank in statuses:
                continue
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[rank] = os.waitstatus_to_exitcode(status)
                if first_end is None:
                    first_end = time.monotonic()
                    deadline = min(deadline, first_end + END_PATIENCE_S)
        if time.monotonic() > deadline:
            for rank in set(range(len(ranks))) - statuses.keys():
                life.left.append(f"rank {rank}")
                os.kill(ranks[rank], signal.SIGKILL)
                _, status = os.waitpid(ranks[rank], 0)
                statuses[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    if -signal.SIGKILL in statuses.values():
        life.killed = True
    life.seconds_to_end = time.monotonic() - (first_end or time.monotonic())
    return [statuses[rank] for rank in range(len(ranks))]


def end_marked(mark: str) -> list[str]:
    """End processes of a life that do not end by themselves; gives their command lines."""
    deadline = time.monotonic() + LAST_END_PATIENCE_S
    while (left := list(_marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return [f"process {process.pid}" for process in left]


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _be_rank(
    words: Sequence[str],
    folder: Path,
    rank: int,
    world_size: int,
    port: int,
    mark: str,
    kill: Kill | None,
    scale: Scale | None,
    tell: int,
) -> None:
    """Be a rank of a life, in a forked process; never returns."""
    status = 70
    try:
        log = os.open(f"{mark}.rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # pytest has put its own in their place.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            | {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), MARK: mark}
        )
        if rank == 0:
            _tell_phases(tell)
        counts = _count(folder, rank, kill, scale)
        status = cli.main(words)
        if rank == 0 and status == 0:
            Path(f"{folder}.counts.json").write_text(json.dumps(counts))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _tell_phases(tell: int) -> None:
    phase = PhaseTimer.phase

    def told(timer: PhaseTimer, name: str) -> Any:
        with contextlib.suppress(BrokenPipeError):
            os.write(tell, f"{name}\n".encode())
        return phase(timer, name)

    PhaseTimer.phase = told  # type: ignore[method-assign]


def _count(folder: Path, rank: int, kill: Kill | None, scale: Scale | None) -> dict[str, int]:
    """Count a rank's file operations and bytes of checkpoints, and kill it at one of them where that is asked for."""
    counts = {"file_events": 0, "bytes_written": 0}
    file_event, writes_until = _own_moments(rank, kill, scale)
    inside = str(folder)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(inside):
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            counts["file_events"] += 1
            if counts["file_events"] >= file_event:
                os.kill(os.getpid(), signal.SIGKILL)

    write = HashedFile.write

    def counted(file: HashedFile, data: bytes) -> int:
        counts["bytes_written"] += len(data)
        if counts["bytes_written"] > writes_until:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    if rank == 0:
        sys.addaudithook(audit)
    HashedFile.write = counted  # type: ignore[method-assign, assignment]
    return counts


def _own_moments(rank: int, kill: Kill | None, scale: Scale | None) -> tuple[int, int]:
    """File operation and byte at which a rank kills itself; beyond all where it does not."""
    never = 1 << 62
    if kill is None or scale is None:
        return never, never
    is_file, is_writer = kill.victim == "file" and rank == 0, kill.victim == "writer" and rank == kill.occurrence
    file_event = 1 + int(kill.moment * scale.file_events) if is_file else never
    return file_event, int(kill.moment * scale.bytes_written) if is_writer else never


def scale_of(folder: Path, metrics: Sequence[dict[str, Any]]) -> Scale:
    """The scale of an uninterrupted run, which has ended.

    Args:
        folder: Its directory.
        metrics: Lines of its metrics.jsonl.
    """
    times: dict[str, list[float]] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith("time/"):
                times.setdefault(key.removeprefix("time/").removesuffix("_s"), []).append(value)
    counts = json.loads(Path(f"{folder}.counts.json").read_text())
    seconds = {name: sum(values) / len(values) for name, values in times.items()}
    return Scale(seconds={"export": EXPORT_S} | seconds | {START: 4.0}, **counts)


def draw_kills(seed: int, count: int, victims: Sequence[Victim], phases: Sequence[str]) -> list[Kill]:
    """Random kills; over the seeds every kind of victim has as many as the others.

    Args:
        seed: Seed.
        count: How many.
        victims: Kinds of victims.
        phases: Phases that they are killed in.
    """
    draw = random.Random(seed)
    chosen = [victims[(seed * count + number) % len(victims)] for number in range(count)]
    draw.shuffle(chosen)
    return [
        Kill(
            victim=victim,
            phase=draw.choice(phases),
            occurrence=draw.randint(0 if victim == "writer" else 1, 1 if victim == "writer" else 2),
            moment=draw.random(),
        )
        for victim in chosen
    ]


def live_through(
    words: Sequence[str],
    folder: Path,
    world_size: int,
    kills: Sequence[Kill],
    scale: Scale,
    look: Callable[[int, Life], None] = lambda number, life: None,
) -> list[Life]:
    """Start a run again and again, with a kill in each life, until it ends by itself without one.

    Args:
        words: What follows `megatron-fipo`.
        folder: The run directory.
        world_size: Ranks.
        kills: The kills, in order; what is left of them when the run ends by itself is dropped.
        scale: See `scale_of`.
        look: Called after every life with its number and its end.

    Returns:
        Every life.
    """
    lives = []
    for number, kill in enumerate([*kills, None]):
        life = live(words, folder, world_size, f"life{number}", kill, scale)
        lives.append(life)
        look(number, life)
        if life.statuses == [0] * world_size:
            break
    return lives
