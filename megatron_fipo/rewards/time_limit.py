"""A limit on the processor time of a piece of work in the main thread.

Processor time, so that a verdict does not depend on what else the machine does.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REPEAT_S = 0.1


class TimeLimitError(BaseException):
    """The time is over. Not an `Exception`, which a library could take for a failure of its own and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after so many seconds of processor time.

    The interruption waits for the end of whatever C function is running, and is repeated until it gets through.

    Raises:
        TimeLimitError: The time is over.
    """
    previous = signal.signal(signal.SIGPROF, _interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds, _REPEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise TimeLimitError
