"""Processes that something has started, over whatever generations: they inherit a mark in their environment."""

import os
import time
from collections.abc import Collection

import psutil

MARK = "MEGATRON_FIPO_TEST_MARK"


def command_lines(mark: str) -> list[str]:
    """Command lines of the processes that began with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def left_after(mark: str, patience_s: float, lasting: Collection[str] = ()) -> list[str]:
    """Command lines of those that are left after a while, which ends early when none is, but for some that last."""
    deadline = time.monotonic() + patience_s
    while (left := [each for each in command_lines(mark) if each not in lasting]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def mark_own_children(mark: str) -> None:
    """Have processes that this one starts from now on carry the mark."""
    os.environ[MARK] = mark
