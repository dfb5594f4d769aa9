"""A whole run on a terminal: what its owner sees, and what is left when it ends."""

import multiprocessing
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_fipo.cli import main
from megatron_fipo.config.load import dump_config
from tests.integration.small_runs import prompts, read_lines, small_run, write_inputs
from tests.terminal import ALTERNATE_SCREEN, OLD_SCREEN, SHOW_CURSOR, Terminal, without_escapes

STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("live"))


def call_main(words: list[str], terminal: str) -> None:
    """The command in a child that has the libraries already, on a terminal."""
    for stream in (1, 2):
        os.dup2(os.open(terminal, os.O_WRONLY | os.O_NOCTTY), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm-256color"
    # Threads that the parent's OpenMP has started do not exist here.
    torch.set_num_threads(1)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture
def run_on_terminal() -> Callable[..., tuple[int | None, str]]:
    def run(*words: object) -> tuple[int | None, str]:
        master, slave = pty.openpty()
        terminal = Terminal(None, master)  # type: ignore[arg-type]
        terminal.resize(80, 24)
        arguments = ([*map(str, words)], os.ttyname(slave))
        process = multiprocessing.get_context("fork").Process(target=call_main, args=arguments)
        process.start()
        terminal.read_until("rank 0 INFO")
        os.close(slave)
        try:
            shown = terminal.read_to_end(timeout_s=100)
            process.join(timeout=20)
        finally:
            process.kill()
            process.join()
            os.close(master)
        return process.exitcode, shown

    return run


def test_a_run_is_shown_on_one_screen(root: Path, run_on_terminal: Callable[..., tuple[int | None, str]]) -> None:
    config = small_run(root, "shown", num_steps=STEPS, data=prompts(root, held_out="held_out"))
    path = root / "shown.yaml"
    path.write_text(dump_config(config))
    code, shown = run_on_terminal("train", path)
    assert code == 0, shown
    during, after = shown.split(OLD_SCREEN)
    assert during.count(ALTERNATE_SCREEN) == 1
    assert "evaluation" in during.split(ALTERNATE_SCREEN)[1]
    assert SHOW_CURSOR in after
    lines = without_escapes(after).replace("\r", "").splitlines()
    # Below the log lines the last frame stays, of the step and of everything that is known of it.
    for step in range(1, STEPS + 1):
        assert any(f"rank 0 INFO step {step}/{STEPS}, reward" in line for line in lines)
    title = next(place for place, line in enumerate(lines) if line.startswith(" shown "))
    frame = "\n".join(lines[title:])
    for text in (f"step {STEPS}/{STEPS}", f"after step {STEPS}", "updates ", "2/2", "entropy", "clipped low/high"):
        assert text in frame, text
    for text in ("influence", "memory GiB", "generation tok/s", "accuracy", "times", "response with reward"):
        assert text in frame, text
    log = (root / "shown" / "logs" / "rank_0.log").read_text()
    assert [line for line in lines if "rank 0 INFO step" in line] == [
        line for line in log.splitlines() if "rank 0 INFO step" in line
    ]
    assert [line["step"] for line in read_lines(root / "shown" / "metrics.jsonl")] == list(range(STEPS + 1))


def test_the_end_of_a_failed_run_stands_below_the_screen(
    root: Path, run_on_terminal: Callable[..., tuple[int | None, str]]
) -> None:
    path = root / "failed.yaml"
    path.write_text(dump_config(small_run(root, "failed", data=prompts(root, train="hopeless"))))
    code, shown = run_on_terminal("train", path)
    assert code == 1
    after = without_escapes(shown.split(OLD_SCREEN)[1]).replace("\r", "")
    failure = "megatron-fipo: the run stopped: step 1: rollout.max_generation_rounds = 3"
    assert after.index("step 1/1") < after.index(failure)


def test_off_is_plain_lines_on_a_terminal_too(
    root: Path, run_on_terminal: Callable[..., tuple[int | None, str]]
) -> None:
    path = root / "plain.yaml"
    path.write_text(dump_config(small_run(root, "plain")))
    code, shown = run_on_terminal("train", path, "--metrics.live_view", "off", "--checkpoint.export_at_end", "false")
    assert code == 0
    assert "\x1b[" not in shown
    assert "rank 0 INFO step 1/1, reward" in shown
    assert not (root / "plain" / "logs").exists()
