"""A grading process, `python -m megatron_fipo.rewards.worker PARENT_PID`; messages go through its input and output.

It imports neither torch nor NumPy by itself, starts in a tenth of a second without math-verify, and ends with its
parent. Whatever a term prints goes to the standard error output.
"""

import ctypes
import os
import resource
import signal
import sys
import traceback
from typing import Any, BinaryIO

from megatron_fipo.config.base import ConfigError
from megatron_fipo.rewards.grader import Grader
from megatron_fipo.runtime.messages import LENGTH_BYTES, body_length, decode_body, encode_message

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2).
OUT_OF_MEMORY = 77
"""Exit status after a MemoryError."""


def main(parent: int) -> None:
    """Grade until the input ends."""
    _end_with(parent)
    # Sent to the whole job, they ask the parent to come to an end, for which it may still want scores.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    reader, writer = _take_streams()
    settings = _read(reader)
    if settings is None:
        return
    memory = settings.pop("memory_bytes")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    process = os.getpid()

    def send(message: Any) -> None:
        # A fork that a user's function left behind comes here too; two answers to one job would shift all others.
        if os.getpid() != process:
            os._exit(0)
        writer.write(encode_message(message))
        writer.flush()

    try:
        grader = Grader(**settings, announce=lambda kind, term: send({"at": [kind, term]}))
    except ConfigError as error:
        send({"refused": [error.field, str(error.value), error.rule, error.way_out]})
        return
    send({"ready": True})
    while (jobs := _read(reader)) is not None:
        for job in jobs:
            send(_do(grader, job))


def _do(grader: Grader, job: dict[str, Any]) -> Any:
    try:
        return {"same": grader.same_answer(*job["pair"])} if "pair" in job else grader.grade(job)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        # A defect of the grader must not pass for a hostile answer.
        traceback.print_exc()
        return {"failure": "raised", "term": "the grader", "problem": f"{type(error).__name__}: {error}"}


def _end_with(parent: int) -> None:
    """Be killed when the parent is, at any moment; the end of the input is noticed only between jobs."""
    if ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL) != 0 or os.getppid() != parent:
        os._exit(1)


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Keep input and output for messages alone."""
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return reader, writer


def _read(reader: BinaryIO) -> Any:
    """The next message; None at the end of the input."""
    head = reader.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    return decode_body(reader.read(body_length(head)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
