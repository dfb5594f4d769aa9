"""The live view on a real terminal, driven by a program that does no work."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.terminal import (
    ALTERNATE_SCREEN,
    HIDE_CURSOR,
    OLD_SCREEN,
    SHOW_CURSOR,
    Terminal,
    on_terminal,
    without_escapes,
)

PROGRAM = """
import logging, os, sys
from pathlib import Path
from megatron_fipo.display.watch import watch_run
from megatron_fipo.runtime.logging import setup_logging

setup_logging(0)
with watch_run("auto", 0) as progress:
    progress.begin_run(Path(sys.argv[1]), 3)
    progress.begin_step(1)
    progress.begin_phase("rollout")
    logging.getLogger("megatron_fipo.test").info("a log line")
    print("a stray print")
    progress.show_response("3+4=", "it is 7", 1.0)
    progress.advance(5, 8)
    for word in sys.stdin:
        if word == "crash\\n":
            raise ValueError("the weights are broken")
        if word == "finish\\n":
            break
        progress.show_response("3+4=", word.strip(), 0.0)
"""


@contextmanager
def running(folder: Path) -> Iterator[Terminal]:
    with on_terminal([sys.executable, "-c", PROGRAM, str(folder / "arithmetic")]) as terminal:
        shown = terminal.read_until("it is 7")
        assert shown.index(ALTERNATE_SCREEN) < shown.index("it is 7")
        assert HIDE_CURSOR in shown
        yield terminal


def say(terminal: Terminal, word: str) -> None:
    assert terminal.process.stdin is not None
    terminal.process.stdin.write(f"{word}\n".encode())
    terminal.process.stdin.flush()


def test_it_shows_the_run_and_leaves_lines_and_last_frame_behind(tmp_path: Path) -> None:
    with running(tmp_path) as terminal:
        frame = without_escapes(terminal.output)
        for text in ("arithmetic", "step 1/3", "5/8", "rank 0 INFO a log line", "a stray print"):
            assert text in frame
        say(terminal, "finish")
        end = terminal.read_to_end()
        assert terminal.process.wait(10) == 0
    after = end[end.rindex(OLD_SCREEN) :]
    assert SHOW_CURSOR in after
    for text in ("rank 0 INFO a log line", "a stray print", "step 1/3", "it is 7"):
        assert text in without_escapes(after)
    assert "INFO a log line" in (tmp_path / "arithmetic" / "logs" / "rank_0.log").read_text()


def test_an_exception_is_printed_below_the_view(tmp_path: Path) -> None:
    with running(tmp_path) as terminal:
        say(terminal, "crash")
        end = terminal.read_to_end()
        assert terminal.process.wait(10) == 1
    after = end[end.rindex(OLD_SCREEN) :]
    shown = without_escapes(after).splitlines()
    begins = shown.index("Traceback (most recent call last):")
    assert any("step 1/3" in line for line in shown[:begins])
    assert shown[-1] == "ValueError: the weights are broken"


def test_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    with running(tmp_path) as terminal:
        terminal.process.send_signal(signal.SIGINT)
        end = terminal.read_to_end()
        assert terminal.process.wait(10) != 0
    assert SHOW_CURSOR in end[end.rindex(OLD_SCREEN) :]
    assert "KeyboardInterrupt" in end[end.rindex(OLD_SCREEN) :]


def test_a_killed_process_leaves_a_usable_terminal(tmp_path: Path) -> None:
    with running(tmp_path) as terminal:
        terminal.process.kill()
        end = terminal.read_to_end()
    assert end.endswith(OLD_SCREEN + SHOW_CURSOR)


def test_a_resized_terminal_is_painted_anew(tmp_path: Path) -> None:
    with running(tmp_path) as terminal:
        terminal.resize(40, 15)
        say(terminal, "narrow now")
        terminal.read_until("narrow now")
        painted = terminal.output[terminal.output.rindex("\x1b[2J") :]
        rows = without_escapes(painted).replace("\r", "").split("\n")
        assert max(len(row) for row in rows[:14]) <= 40


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    words = ["sh", "-c", 'exec "$@" 2>&1 | cat', "sh", sys.executable, "-c", PROGRAM, str(tmp_path / "piped")]
    with on_terminal(words) as terminal:
        say(terminal, "finish")
        shown = terminal.read_to_end()
    assert "\x1b" not in shown
    assert shown.splitlines()[0].endswith("rank 0 INFO a log line")
    assert shown.splitlines()[1] == "a stray print"
