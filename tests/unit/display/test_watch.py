"""Who watches: the view's export, plain lines, and the logs of ranks that share rank 0's terminal."""

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megatron_fipo.config.base import ConfigError
from megatron_fipo.display.live_view import LiveView
from megatron_fipo.display.watch import PlainLines, watch_run
from megatron_fipo.runtime.logging import own_logger
from megatron_fipo.runtime.progress import NO_PROGRESS


@pytest.fixture
def own_lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Messages of the package's logger, whose handlers come back afterwards."""
    logger = own_logger()
    handlers, level = logger.handlers[:], logger.level
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    yield texts
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_the_screen_can_be_exported_while_it_is_shown(tmp_path: Path, own_lines: list[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with LiveView(console) as view:
        view.begin_run(tmp_path / "arithmetic", 12)
        view.begin_step(3)
        view.begin_phase("rollout")
        view.advance(5, 8)
        view.show_response("3+4=", "7 <b>&\x1b[31m", 1.0)
        view.export_svg(tmp_path / "view.svg", width=60, height=20)
    svg = (tmp_path / "view.svg").read_text(encoding="utf-8")
    shown = re.sub(r"<[^>]+>", "", svg).replace("&#160;", " ")
    assert svg.startswith("<svg")
    assert "@font-face" not in svg
    for text in ("arithmetic", "step 3/12", "generation", "5/8", "response with reward 1.000", "7 &lt;b&gt;&amp;·[31m"):
        assert text in shown


def test_a_view_that_was_never_begun_leaves_no_trace(own_lines: list[str]) -> None:
    file = io.StringIO()
    with pytest.raises(ConfigError), LiveView(Console(file=file, force_terminal=True)):
        raise ConfigError("model.path", "x", "is missing", "name it")
    assert file.getvalue() == ""


def test_a_view_that_cannot_be_painted_ends_and_not_the_run(tmp_path: Path, own_lines: list[str]) -> None:
    with LiveView(Console(file=io.StringIO(), force_terminal=True, width=80, height=24)) as view:
        view.begin_run(tmp_path / "arithmetic", 12)
        view.show_response("p", None, 1.0)  # type: ignore[arg-type]
        view._painter.join(timeout=20)
        assert not view._painter.is_alive()
        view.begin_step(1)
    assert own_lines[0].startswith("the live view ended:\nTraceback")


def test_a_phase_that_takes_minutes_has_lines_of_its_own(own_lines: list[str]) -> None:
    times = iter([0.0, 20.0, 61.0, 62.0, 122.0, 123.0, 124.0])
    lines = PlainLines(lambda: next(times))
    lines.begin_step(3)
    lines.begin_phase("rollout")
    for done in (1, 2, 3, 4):
        lines.advance(done, 8)
    lines.begin_phase("update")
    lines.advance(1, 2)
    assert own_lines == ["step 3: rollout 2 of 8 after 61 s", "step 3: rollout 4 of 8 after 122 s"]


def test_who_watches_depends_on_rank_and_terminal(
    tmp_path: Path, own_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for choice, terminal, name in (("off", "xterm", 0), ("auto", "xterm", 0), ("auto", "dumb", 0)):
        monkeypatch.setenv("TERM", terminal)
        with watch_run(choice, name) as progress:  # type: ignore[arg-type]
            assert isinstance(progress, PlainLines)
    with watch_run("auto", 3) as progress:
        assert progress is NO_PROGRESS
    with watch_run("on", 0) as progress:
        assert isinstance(progress, LiveView)


def test_other_ranks_log_to_files_while_rank_0_has_the_terminal(tmp_path: Path, own_lines: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), watch_run("on", 3) as progress:
        progress.begin_run(tmp_path, 12)
        log = tmp_path / "logs" / "rank_3.log"
        assert not log.exists(), "the file appears with its first line"
        logging.getLogger("megatron_fipo.test").warning("one group was stale")
        assert "rank 3 WARNING one group was stale" in log.read_text()
        _ = 1 / 0
    assert "ZeroDivisionError" in log.read_text()
    assert own_lines == []


def test_what_other_ranks_wrote_is_shown_when_the_view_ends(tmp_path: Path, own_lines: list[str]) -> None:
    file = io.StringIO()
    with LiveView(Console(file=file, force_terminal=True, width=80, height=24)) as view:
        view.begin_run(tmp_path, 12)
        (tmp_path / "logs" / "rank_3.log").write_text("12:00:00 rank 3 ERROR rank 3 broke down\nTraceback\x1b[2J\n")
    after = file.getvalue().split("\x1b[?1049l")[1]
    assert "rank 3 ERROR rank 3 broke down\n" in after
    assert "Traceback·[2J" in after
