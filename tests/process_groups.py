"""Which processes of a group are left."""

import os
import time

import psutil


def members(group: int) -> list[int]:
    """Processes of a group that run; ended ones that nobody has waited for do not count."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_until_empty(group: int, timeout_s: float = 20.0) -> None:
    """Wait until a group has no process; the kernel ends them one after the other."""
    deadline = time.monotonic() + timeout_s
    while left := members(group):
        assert time.monotonic() < deadline, f"processes {left} of group {group} are left"
        time.sleep(0.01)
