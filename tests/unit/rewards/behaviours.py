"""A reward that does what the response's first line says."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def reward(response: str, metadata: Mapping[Any, Any]) -> object:
    action, _, value = response.split("\n")[0].partition(" ")
    # Tuples and numbers as keys arrive as they are.
    return sum(metadata[1]) if action == "add" else ACTIONS[action](value)


def fail(value: str) -> None:
    raise ValueError(value)


def say(value: str) -> int:
    print(value)
    os.write(1, b"noise")
    return len(sys.stdin.read())


def fork(value: str) -> float:
    if os.fork() == 0 and value == "and wait":
        signal.pause()
    return 0.5


ACTIONS: dict[str, Callable[[str], object]] = {
    "give": float,
    "nothing": lambda value: None,
    "raise": fail,
    "exit": sys.exit,
    "hang": lambda value: signal.pause(),
    "die": lambda value: os.kill(os.getpid(), signal.SIGKILL),
    "fill": lambda value: len(bytearray(64 * 1024**3)),
    "print": say,
    "fork": fork,
    # Waits until somebody opens the pipe to write.
    "read": lambda value: float(Path(value).read_text()),
    "imported": lambda value: sum(name in sys.modules for name in value.split()),
}
