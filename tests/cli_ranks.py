"""Ranks of a real `megatron-fipo` command, each a process as a launcher would start it, forked to save the imports."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_fipo.cli import main
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.runtime.watchdog.whereabouts import Whereabouts

BUILDING = (0, "building")
"""A place to hold at: before the engine is built, in a run or an evaluation."""


class CliRanks:
    """Ranks on this machine; a context, at whose end none is left.

    Args:
        folder: Where each rank's stdout and stderr go.
        words: The command.
        world_size: Ranks; a single one is started plainly.
        hold_at: Step and phase in whose beginning a rank waits for `go_on`, or `BUILDING`.
        holding: The rank that waits.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[object],
        world_size: int = 2,
        hold_at: tuple[int, str] | None = None,
        holding: int = 0,
    ) -> None:
        self.folder, self.world_size = folder, world_size
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("fork")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._here, there = context.Pipe()
        self.processes = []
        for rank in range(world_size):
            variables = {}
            if world_size > 1:
                variables = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            held = hold_at if rank == holding else None
            arguments = ([*map(str, words)], variables, folder / f"rank_{rank}", held, there)
            self.processes.append(context.Process(target=_be_rank, args=arguments))

    def __enter__(self) -> Self:
        for process in self.processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._tell_stacks()
        for process in self.processes:
            process.kill()
            process.join()
        if error is not None:
            error.add_note("\n".join(f"--- rank {rank}\n{self.told(rank)}" for rank in range(self.world_size)))

    def _tell_stacks(self) -> None:
        """Have the ranks that hang tell where."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGABRT)
                process.join(5.0)

    def wait_until_held(self, timeout_s: float = 120.0) -> None:
        """Wait until the rank is where it is to wait."""
        assert self._here.poll(timeout_s), "no rank has come to the place"
        self._here.recv()

    def go_on(self) -> None:
        """Let the rank go on."""
        self._here.send(None)

    def fail(self, text: str) -> None:
        """Have the rank raise a KeyError of that text where it waits."""
        self._here.send(text)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(self.world_size):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait(self, timeout_s: float, *ranks: int) -> tuple[list[int | None], float]:
        """Wait for some ranks, or all, to end.

        Returns:
            Exit status of each, negative for a signal and None where it is still there, and the seconds that it took.
        """
        started = time.monotonic()
        chosen = [self.processes[rank] for rank in ranks or range(self.world_size)]
        waiting = {process.sentinel for process in chosen}
        while waiting and (left := started + timeout_s - time.monotonic()) > 0:
            waiting -= set(wait_for(waiting, left))  # type: ignore[arg-type]
        seconds = time.monotonic() - started
        for process in chosen:
            if process.sentinel not in waiting:
                process.join(1.0)
        return [process.exitcode for process in chosen], seconds

    def told(self, rank: int = 0) -> str:
        """What a rank wrote to stderr."""
        path = self.folder / f"rank_{rank}.err"
        return path.read_text() if path.exists() else ""

    def last_line(self, rank: int = 0) -> str:
        """The last of it."""
        return (self.told(rank).splitlines() or [""])[-1]


def _be_rank(
    words: list[str], variables: dict[str, str], output: Path, hold_at: tuple[int, str] | None, parent: Connection
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    faulthandler.enable()
    # Threads that the parent's OpenMP has started do not exist here.
    torch.set_num_threads(1)
    if hold_at is not None:
        _hold(hold_at, parent)
    status = 1
    try:
        status = main(words)
    except BaseException:
        # As the interpreter would.
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _hold(place: tuple[int, str], parent: Connection) -> None:
    begin_phase, begin_engine = Whereabouts.begin_phase, EmbeddedEngine.__init__

    def held(self: Whereabouts, name: str) -> None:
        begin_phase(self, name)
        if (self.told()["step"], name) == place:
            parent.send(None)
            if text := parent.recv():
                raise KeyError(text)

    def held_before(self: EmbeddedEngine, *arguments: Any) -> None:
        parent.send(None)
        parent.recv()
        begin_engine(self, *arguments)

    Whereabouts.begin_phase = held  # type: ignore[method-assign]
    if place == BUILDING:
        EmbeddedEngine.__init__ = held_before  # type: ignore[method-assign]
