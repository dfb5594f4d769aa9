"""A run on one screen of the terminal, painted by a thread of its own."""

import io
import logging
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console, ScreenContext
from rich.control import Control
from rich.text import Text

from megatron_fipo.display.live_state import LiveState
from megatron_fipo.display.plain_text import harmless
from megatron_fipo.display.screen import Screen, recorded_svg
from megatron_fipo.runtime.logging import line_format, own_logger

_SHORTEST_INTERVAL_S = 0.25
_LARGEST_SHARE = 0.003
"""Part of one core's time that painting may take: a slow machine gets fewer frames, not a slower run."""

# Waits for the end of its input, which comes when the process that holds the other end is gone, however it went.
_RESTORE_TERMINAL = "cat >/dev/null; printf '\\033[?1049l\\033[?25h'"


class LiveView(LiveState):
    """Paints the run from `begin_run` until the context is left; use it as a context.

    While it paints, this package's log lines and whatever Python code writes to stdout and stderr become lines of the
    screen; log lines also go to a file in the run directory. When it ends, the terminal has its old content back, below
    it those lines and the last frame, and below that whatever is printed next: an exception, for one. A process killed
    without warning leaves a usable terminal too.

    Args:
        console: Where it paints.
        clock: Seconds that only grow.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._console = console
        self._logs: Path | None = None
        self._screen: ScreenContext | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._painter = threading.Thread(target=self._paint_until_stopped, name="live view", daemon=True)
        self._capture = _Capture(self.add_line)

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin_run(self, directory: Path, num_steps: int) -> None:
        """Take the terminal and begin to paint."""
        super().begin_run(directory, num_steps)
        self._logs = directory / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._guard = _guard_terminal(self._console)
        self._screen = self._console.screen(hide_cursor=True)
        self._screen.__enter__()
        self._capture.begin(self._logs / "rank_0.log")
        self._painter.start()

    def close(self) -> None:
        """Give the terminal back and leave the last frame on it; does nothing where nothing was begun."""
        self._stop.set()
        if self._painter.is_alive():
            self._painter.join()
        self._restore()

    def export_svg(self, path: Path, width: int = 100, height: int = 30) -> None:
        """Write the screen as it is now to an SVG file, drawn on a terminal of the given size."""
        console = Console(record=True, file=io.StringIO(), width=width, height=height, force_terminal=True)
        view = self.view()
        with console.screen() as screen:
            screen.update(Screen(view, self.clock()))
        path.write_text(recorded_svg(console, harmless(view.name)), encoding="utf-8")

    def _paint_until_stopped(self) -> None:
        interval, size = _SHORTEST_INTERVAL_S, self._console.size
        while not self._stop.wait(interval):
            started = time.thread_time()
            try:
                if self._console.size != size:
                    size = self._console.size
                    self._console.clear()
                self.paint()
            # A terminal that is gone, or a value that cannot be shown, must not end the run.
            except Exception:
                self._restore(with_frame=False)
                own_logger().warning("the live view ended:\n%s", traceback.format_exc())
                return
            interval = max(_SHORTEST_INTERVAL_S, (time.thread_time() - started) / _LARGEST_SHARE)

    def paint(self) -> None:
        """Paint one frame."""
        assert self._screen is not None, "the run has begun"
        # One write: half a frame would flicker.
        with self._console:
            self._console.control(Control.home())
            self._screen.update(Screen(self.view(), self.clock()))

    def _restore(self, with_frame: bool = True) -> None:
        screen, self._screen = self._screen, None
        if screen is None:
            return
        self._capture.end()
        # The terminal may be gone.
        with suppress(OSError):
            screen.__exit__(None, None, None)
            self._leave_behind(with_frame)
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()

    def _leave_behind(self, with_frame: bool) -> None:
        """Print what the screen has shown, and what the other ranks wrote meanwhile."""
        view = self.view()
        for line in view.lines:
            self._console.print(Text(harmless(line)), soft_wrap=True)
        view.lines.clear()
        if with_frame:
            self._console.print(Screen(view, self.clock()))
        for path in sorted((self._logs or Path()).glob("rank_*.log")):
            if path.name != "rank_0.log" and (text := path.read_text(encoding="utf-8", errors="replace")):
                self._console.print(Text(harmless(f"{path}:\n{text}", newline="\n")), soft_wrap=True)


def _guard_terminal(console: Console) -> "subprocess.Popen[bytes] | None":
    """Start what gives the terminal back if this process is killed; None where there is no terminal to give back."""
    try:
        terminal = console.file.fileno()
    except (OSError, ValueError):
        return None
    # A session of its own, so that what ends this process group does not end the guard first.
    return subprocess.Popen(
        ["sh", "-c", _RESTORE_TERMINAL], stdin=subprocess.PIPE, stdout=terminal, start_new_session=True
    )


class _Lines(io.TextIOBase):
    """A text file whose lines go to a function."""

    def __init__(self, add_line: Callable[[str], None]) -> None:
        self._add_line, self._rest = add_line, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._add_line(line)
        return len(text)


class _LineHandler(logging.Handler):
    """Log records, one line each, to a function."""

    def __init__(self, add_line: Callable[[str], None]) -> None:
        super().__init__()
        self._add_line = add_line

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._add_line(line)


class _Capture:
    """Turns log lines and Python's stdout and stderr into lines of the screen, for as long as it is on."""

    def __init__(self, add_line: Callable[[str], None]) -> None:
        self._add_line = add_line
        self._streams: tuple[IO[str], IO[str]] | None = None
        self._handlers: list[logging.Handler] = []

    def begin(self, log_file: Path) -> None:
        logger = own_logger()
        self._handlers = logger.handlers[:]
        handlers: list[logging.Handler] = [
            _LineHandler(self._add_line),
            logging.FileHandler(log_file, encoding="utf-8"),
        ]
        for handler in handlers:
            handler.setFormatter(line_format(0))
        # A log that was sent to a file goes on there.
        kept = [each for each in self._handlers if not _writes_to_terminal(each)]
        logger.handlers[:] = handlers + kept
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Lines(self._add_line), _Lines(self._add_line)  # type: ignore[assignment]

    def end(self) -> None:
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams
            self._streams = None
            logger = own_logger()
            for handler in logger.handlers:
                if handler not in self._handlers:
                    handler.close()
            logger.handlers[:] = self._handlers


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and bool(handler.stream) and handler.stream.isatty()
