"""How a run is asked to come to an early end, and where it looks whether it was."""

import asyncio
import os
import threading
import weakref
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


class StopRequested(Exception):  # noqa: N818  (it is no error)
    """The run was asked to come to an end; the text is the signal's name. Raised on every rank."""


class StopRequest:
    """Whether this rank knows that the run shall end; another thread enters that.

    The ranks do not learn of it at one time, so none leaves the common order on its own account: rank 0 looks where all
    ranks can hear of it, and the others leave with rank 0.

    Attributes:
        has_nothing_to_save: Whether the run may end wherever it is: what it does now is done again after a restart, and
            what it did before is saved. So it is until the first step.
    """

    def __init__(self) -> None:
        self.has_nothing_to_save = True
        self._signal = ""
        self._lock = threading.Lock()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._event)

    def fileno(self) -> int:
        """A descriptor that is readable once a stop is asked for; nobody reads it."""
        return self._event

    @property
    def signal(self) -> str:
        """Name of the signal that asked; empty before."""
        return self._signal

    def ask(self, signal_name: str) -> None:
        """Ask for a stop; only the first signal counts. Returns at once, from any thread."""
        with self._lock:
            if not self._signal:
                self._signal = signal_name
                os.eventfd_write(self._event, 1)

    def raise_if_asked(self) -> None:
        """Raise StopRequested where a stop was asked for."""
        if self._signal:
            raise StopRequested(self._signal)

    async def or_work[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Do something, and break it off where a stop is asked for.

        What is done already has its result, which is given although a stop was asked for: the caller would take it for
        not done.

        Raises:
            StopRequested: One was, and the work has been cancelled.
        """
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        loop.add_reader(self._event, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            self.raise_if_asked()
            raise
        finally:
            loop.remove_reader(self._event)

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Let the run end at any place inside."""
        before, self.has_nothing_to_save = self.has_nothing_to_save, True
        try:
            yield
        finally:
            self.has_nothing_to_save = before


NO_STOP = StopRequest()
"""For where nobody asks."""
