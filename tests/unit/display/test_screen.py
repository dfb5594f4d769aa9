"""What the live view's screen says, on terminals of several sizes."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from megatron_fipo.display.live_state import LiveState
from megatron_fipo.display.screen import Screen

METRICS = {
    "rollout/reward_mean": 0.412,
    "rollout/response_length_mean": 25.1,
    "train/entropy": 0.31,
    "train/loss": -0.0123,
    "train/grad_norm": 0.5,
    "train/clip_fraction_low": 0.011,
    "train/clip_fraction_high": 0.024,
    "fipo/influence_weight_mean": 1.0025,
    "perf/peak_memory_gib": 1.25,
    "perf/rollout_response_tokens_per_s": 12345.0,
    "perf/update_tokens_per_s": 950.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def running(clock: Clock, steps: int = 2, **metrics: Any) -> LiveState:
    """A run of ten steps, some of them done: 4 s of generation, 3 s of updates, 1 s between; then half a rollout."""
    state = LiveState(clock)
    state.begin_run(Path("runs/arithmetic"), 10)
    for step in range(1, steps + 1):
        state.begin_step(step)
        for phase, seconds in (("rollout", 4.0), ("update", 3.0)):
            state.begin_phase(phase)
            clock.now += seconds
            state.end_phase(phase, seconds)
        clock.now += 1
        state.end_step(step, {"step": step, **METRICS, **metrics})
    state.begin_step(steps + 1)
    state.begin_phase("rollout")
    state.advance(0, 64)
    clock.now += 2
    state.advance(16, 64)
    return state


def rows(state: LiveState, clock: Clock, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    options = console.options.update(width=width, height=height)
    lines = console.render_lines(Screen(state.view(), clock()), options, pad=False)
    return ["".join(segment.text for segment in line) for line in lines[:height]]


def test_a_screen_has_everything_an_owner_looks_for() -> None:
    clock = Clock()
    state = running(clock)
    state.show_response("3+4=", "7", 1.0)
    state.add_line("12:00:00 rank 0 WARNING two groups were stale")
    shown = "\n".join(rows(state, clock))
    for text in ("arithmetic", "step 3/10", "generation 0:02", "16/64", "after step 2", "25.1", "1.10% / 2.40%"):
        assert text in shown
    for text in (
        "entropy",
        "0.310",
        "1.0025",
        "memory GiB",
        "1.25",
        "generation tok/s",
        "12.3k",
        "updates tok/s",
        "950",
    ):
        assert text in shown
    for text in ("generation 4.0 s, updates 3.0 s", "response with reward 1.000", "3+4=", "two groups were stale"):
        assert text in shown


def test_time_left_follows_the_counts_of_the_phase_and_the_steps_before() -> None:
    clock = Clock()
    # 2 s for 16 of 64 responses: 6 s to go; then 3 s of updates and 1 s between; 7 more steps of 8 s.
    assert "left 0:10 (run 1:06)" in "\n".join(rows(running(clock), clock))


def test_before_a_step_has_ended_nothing_is_promised() -> None:
    clock = Clock()
    assert "left – (run –)" in "\n".join(rows(running(clock, steps=0), clock))


@pytest.mark.parametrize(("width", "height"), [(40, 15), (20, 5), (80, 24), (200, 60), (41, 3)])
def test_no_row_is_longer_than_the_terminal_and_none_is_lost_below(width: int, height: int) -> None:
    clock = Clock()
    state = running(clock)
    state.show_response("3+4=" * 40, "日本語 " * 500, 0.0)
    for number in range(50):
        state.add_line(f"12:00:00 rank 0 WARNING {number} {'x' * 300}")
    shown = rows(state, clock, width, height)
    assert len(shown) == height
    assert max(cell_len(row) for row in shown) <= width
    assert "step 3/10" in shown[0]
    if height > 10:
        assert any("日本語" in row for row in shown)
        assert "WARNING 49" in shown[-1]


def test_a_long_response_keeps_its_beginning_and_its_end() -> None:
    clock = Clock()
    state = running(clock)
    state.show_response("p", "begins" + "." * 100_000 + "#42", 1.0)
    shown = "\n".join(rows(state, clock, 40, 15))
    assert "begins" in shown
    assert "#42" in shown


def test_control_characters_reach_no_terminal() -> None:
    clock = Clock()
    state = running(clock)
    state.show_response("p\x9b2J", "a\x1b[31mb\rc\x07\nd\u202ee\ud800", 0.0)
    state.add_line("rank 0 WARNING \x1b[2Jgone")
    shown = "\n".join(rows(state, clock))
    assert "a·[31mb·c·⏎d·e·" in shown
    assert "·[2Jgone" in shown
    assert not set("\x1b\x07\r\x9b\u202e\ud800") & set(shown)


def test_numbers_that_are_missing_or_not_finite_do_no_harm() -> None:
    clock = Clock()
    state = running(clock, **{"train/loss": float("nan"), "train/entropy": None, "train/grad_norm": [1.0]})
    state.end_step(2, {"step": 2, "rollout/reward_mean": float("nan")})
    assert "nan" in "\n".join(rows(state, clock))


def test_an_ascii_terminal_gets_ascii() -> None:
    clock = Clock()
    state = running(clock)
    state.show_response("日本語", "7…", 1.0)
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=80, height=24, color_system=None)
    console.print(Screen(state.view(), clock()))
    file.flush()
    assert b"####" in file.buffer.getvalue()  # type: ignore[attr-defined]


def test_within_one_count_progress_never_falls() -> None:
    clock = Clock()
    state = running(clock)
    state.advance(40, 64)
    state.advance(3, 64)
    assert state.view().counts["rollout"] == (40, 64)
    state.advance(0, 64)
    assert state.view().counts["rollout"] == (0, 64)
    state.advance(8, 32)
    assert state.view().counts["rollout"] == (8, 32)


def test_a_view_does_not_change_afterwards() -> None:
    clock = Clock()
    state = running(clock)
    view = state.view()
    state.begin_phase("update")
    state.advance(1, 8)
    state.add_line("later")
    assert (view.phase, dict(view.counts), list(view.lines)) == ("rollout", {"rollout": (16, 64)}, [])
