"""Signals that ask for an end, heard by a thread: the main thread may be inside a call that returns to no Python."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[socket.socket | None]:
    """A socket from which a byte can be read for every signal that comes, its number, as long as the context lasts.

    Only a main thread can have signals; None in others. Signals that somebody else has come to handle meanwhile stay
    so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    ours, kernels = socket.socketpair()
    with ours, kernels:
        ours.setblocking(False)
        kernels.setblocking(False)
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        wakeup = signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _heard_elsewhere)
            # Calls into libraries go on as if nothing had come.
            signal.siginterrupt(number, False)
        try:
            yield ours
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) is _heard_elsewhere:
                    signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)


def _heard_elsewhere(number: int, frame: FrameType | None) -> None:
    """Does nothing; without it the signal would do its default."""


def _forget_socket() -> None:
    signal.set_wakeup_fd(-1)


# A forked child's signals are not this process's.
os.register_at_fork(after_in_child=_forget_socket)
