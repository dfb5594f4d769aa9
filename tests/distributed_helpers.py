"""Run a function on several ranks over gloo, from one forked parent that has already imported everything."""

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo world and return the results in rank order.

    Ranks meet through a file (no ports) and are forked, so that they share the parent's imports; the parent must not
    have started a process group. Results travel as torch-saved bytes.

    Raises:
        AssertionError: A rank failed (every rank's traceback is shown), died, or did not end in `timeout_s`.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, world_size, Path(folder) / "store", there, function, args)
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            outcomes = _collect(pipes, time.monotonic() + timeout_s)
            _dismiss(pipe for rank, pipe in enumerate(pipes) if outcomes.get(rank, (False,))[0])
        finally:
            for process in processes:
                process.join(timeout=1.0)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [f"rank {rank}: {text}" for rank, (ok, text) in sorted(outcomes.items()) if not ok]
    missing = [rank for rank in range(world_size) if rank not in outcomes]
    if missing:
        failures.append(f"ranks {missing}: no result within {timeout_s:.0f} s")
    assert not failures, "\n".join(failures)
    return [torch.load(io.BytesIO(outcomes[rank][1]), weights_only=False) for rank in range(world_size)]


def _collect(pipes: list[Connection], deadline: float) -> dict[int, tuple[bool, Any]]:
    outcomes: dict[int, tuple[bool, Any]] = {}
    waiting = {id(pipe): rank for rank, pipe in enumerate(pipes)}
    open_pipes = list(pipes)
    while open_pipes and (remaining := deadline - time.monotonic()) > 0:
        for pipe in wait(open_pipes, timeout=remaining):
            rank = waiting[id(pipe)]
            try:
                outcomes[rank] = pipe.recv()
            except EOFError:
                outcomes[rank] = (False, "died without a result")
            open_pipes.remove(pipe)
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + 3.0)
    return outcomes


def _dismiss(pipes: Iterable[Connection]) -> None:
    """Let ranks that have reported leave: one that left earlier would close its connections under slower ranks."""
    for pipe in pipes:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(None)


def _rank_main(
    rank: int,
    world_size: int,
    store: Path,
    parent: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    status = 0
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)
        parent.send((True, buffer.getvalue()))
        parent.recv()
    except BaseException:
        parent.send((False, traceback.format_exc()))
        status = 1
    finally:
        parent.close()
        os._exit(status)
