"""Who watches a run: the live view on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.metrics import LiveViewChoice
from megatron_fipo.display.live_view import LiveView
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.logging import line_format, own_logger
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress

logger = logging.getLogger(__name__)

_LONG_PHASE_S = 60.0


@contextmanager
def watch_run(choice: LiveViewChoice, rank: int) -> Iterator[Progress]:
    """What the loop should tell of its progress, until the context is left.

    Args:
        choice: metrics.live_view.
        rank: Global rank. Ranks other than 0 show nothing; under a live view their log lines go to files, because they
            share its terminal.
    """
    shown = choice == "on" or (choice == "auto" and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb")
    if not shown:
        yield PlainLines() if rank == 0 else NO_PROGRESS
    elif rank == 0:
        # Without the file, rich would follow sys.stdout, which the view turns to itself.
        with LiveView(Console(file=sys.stdout, force_terminal=True)) as view:
            yield view
    else:
        log = RankLog(rank)
        try:
            yield log
        except (ConfigError, RunError):
            # Rank 0 raises it as well and shows it.
            raise
        except Exception:
            own_logger().exception("rank %d broke down", rank)
            raise


class PlainLines(Progress):
    """Log lines while a phase takes long; every step has its own line anyway.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step, self._phase = 0, ""
        self._begun = self._told = 0.0

    def begin_step(self, step: int) -> None:
        """Remember its number."""
        self._step = step

    def begin_phase(self, name: str) -> None:
        """Remember when."""
        self._phase = name
        self._begun = self._told = self._clock()

    def advance(self, done: int, total: int) -> None:
        """Tell how far it is, once a minute."""
        now = self._clock()
        if now - self._told >= _LONG_PHASE_S:
            self._told = now
            logger.info("step %d: %s %d of %d after %.0f s", self._step, self._phase, done, total, now - self._begun)


class RankLog(Progress):
    """Sends the log lines of a rank other than 0 to a file of the run directory.

    Args:
        rank: The rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def begin_run(self, directory: Path, num_steps: int) -> None:
        """Turn the log to the file, which appears with its first line."""
        folder = directory / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / f"rank_{self._rank}.log", encoding="utf-8", delay=True)
        handler.setFormatter(line_format(self._rank))
        own_logger().handlers[:] = [handler]
