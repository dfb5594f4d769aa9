"""Programs on a terminal of their own, for tests of what people see."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

ALTERNATE_SCREEN, OLD_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Terminal:
    """A program and what it has written to its terminal so far.

    Attributes:
        process: The program; its input is a pipe.
        master: The terminal's other end.
        output: Everything read so far, escape sequences included.
    """

    process: "subprocess.Popen[bytes]"
    master: int
    output: str = field(default="")

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read_until(self, text: str, timeout_s: float = 60.0) -> str:
        """Read until the output since the last call has the text; returns that output."""
        start, deadline = len(self.output), time.monotonic() + timeout_s
        while text not in self.output[start:]:
            assert self._read(deadline), f"no {text!r} in {self.output[start:]!r}"
        return self.output[start:]

    def read_to_end(self, timeout_s: float = 60.0) -> str:
        """Read until every process has left the terminal; returns the output since the last call."""
        start, deadline = len(self.output), time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        assert time.monotonic() < deadline, "the program did not end"
        return self.output[start:]

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0.0))
        data = b""
        if ready:
            # Linux reports a terminal that everybody has left as an input/output error.
            with contextlib.suppress(OSError):
                data = os.read(self.master, 65536)
        self.output += data.decode("utf-8", errors="replace")
        return bool(data)


@contextmanager
def on_terminal(words: Sequence[str], width: int = 80, height: int = 24) -> Iterator[Terminal]:
    """Run a program whose stdout and stderr are a terminal of the given size."""
    master, slave = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    # A shell's background job ignores the signal, and so would the program.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=slave,
        stderr=slave,
        env={**environment, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    os.close(slave)
    terminal = Terminal(process, master)
    terminal.resize(width, height)
    try:
        yield terminal
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        os.close(master)


def without_escapes(text: str) -> str:
    return _ESCAPES.sub("", text)
