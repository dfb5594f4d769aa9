"""Wall-clock time of a step's phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fipo.runtime.progress import NO_PROGRESS, Progress


class PhaseTimer:
    """Adds up seconds by phase name; `drain` gives and forgets them.

    Args:
        progress: Told of every phase.
    """

    def __init__(self, progress: Progress = NO_PROGRESS) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside under `name`."""
        self._progress.begin_phase(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            self._progress.end_phase(name, seconds)

    def drain(self) -> dict[str, float]:
        """Seconds of every phase since the last call, as metrics `time/<phase>_s`."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}
