"""What the live view costs: alone, and in whole runs that go without it on every second step.

python tools/benchmark_live_view.py
    prints the time of an event, with and without a view, and of a frame.
torchrun --standalone --nproc-per-node N tools/benchmark_live_view.py odd|even CONFIG.yaml [--section.field value ...]
    runs the configuration on a terminal, with the view on odd or on even steps alone, and keeps every step's seconds.
python tools/benchmark_live_view.py compare RUN_ODD RUN_EVEN
    compares every step with itself in the other run, which did the same work: equal configurations repeat bitwise.
"""

import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_fipo.display.live_state import LiveState
from megatron_fipo.display.live_view import LiveView
from megatron_fipo.display.screen import Screen
from megatron_fipo.runtime.progress import NO_PROGRESS

_KEPT = "live_view_seconds.json"


def main() -> None:
    """Measure what the words ask for."""
    match sys.argv[1:]:
        case []:
            measure_alone()
        case ["compare", odd, even]:
            compare(Path(odd), Path(even))
        case ["odd" | "even" as shown, config, *overrides]:
            run_watched(Path(config), overrides, lambda console: EverySecondStep(console, shown == "odd"))
        case _:
            sys.exit(__doc__)


def measure_alone() -> None:
    """Time of single events and frames."""
    for name, progress in (("nobody watches", NO_PROGRESS), ("the live view", LiveState())):
        progress.begin_phase("rollout")
        advance = seconds_of(lambda progress=progress: progress.advance(5, 8))
        response = seconds_of(lambda progress=progress: progress.show_response("prompt", "response", 1.0))
        phase = seconds_of(lambda progress=progress: (progress.begin_phase("a"), progress.end_phase("a", 1.0)))
        times = f"advance {advance * 1e9:.0f} ns, response {response * 1e9:.0f} ns, phase {phase * 1e9:.0f} ns"
        print(f"{name}: {times}")
    state = busy_state()
    for width, height in ((80, 24), (200, 60)):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
        with console.screen() as screen:
            frame = seconds_of(lambda: screen.update(Screen(state.view(), state.clock())), 200)
        print(f"a frame of {width} × {height}: {frame * 1e3:.2f} ms")


def seconds_of(call: Callable[[], Any], repeats: int = 100_000) -> float:
    """Least mean seconds of a call in five rounds."""
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - started) / repeats)
    return best


def busy_state() -> LiveState:
    """A run with something in every part of the screen."""
    state = LiveState()
    state.begin_run(Path("benchmark"), 100)
    readings = ("rollout/reward_mean", "rollout/response_length_mean", "train/entropy", "train/loss", "train/grad_norm")
    for step in range(1, 100):
        state.begin_step(step)
        state.end_step(step, {"step": step, **dict.fromkeys(readings, step % 7 / 7)})
        state.add_line(f"12:00:00 rank 0 INFO step {step}/100, reward 0.5")
    state.begin_phase("rollout")
    state.advance(100, 4096)
    state.show_response("What is 3 + 4? " * 20, "Let us think step by step. " * 4000, 1.0)
    return state


class EverySecondStep(LiveView):
    """A view that hears and paints on every second step; keeps the seconds of all.

    Args:
        console: Where it paints.
        on_odd: On odd steps, else on even ones.
    """

    def __init__(self, console: Console, on_odd: bool) -> None:
        super().__init__(console)
        self._on_odd, self._shows, self._painting = on_odd, False, 0.0
        self._folder = Path()
        self._began: dict[str, float] = {}
        self._steps: list[dict[str, float]] = []

    def begin_run(self, directory: Path, num_steps: int) -> None:
        """Remember where the seconds go."""
        self._folder = directory
        super().begin_run(directory, num_steps)

    def begin_step(self, step: int) -> None:
        """Switch on or off."""
        self._shows = (step % 2 == 1) == self._on_odd
        self._painting = 0.0
        self._began = {"wall": time.perf_counter(), "loop": time.thread_time()}
        super().begin_step(step)

    def begin_phase(self, name: str) -> None:
        """As the view, if it is on."""
        if self._shows:
            super().begin_phase(name)

    def end_phase(self, name: str, seconds: float) -> None:
        """As the view, if it is on."""
        if self._shows:
            super().end_phase(name, seconds)

    def advance(self, done: int, total: int) -> None:
        """As the view, if it is on."""
        if self._shows:
            super().advance(done, total)

    def show_response(self, prompt: str, response: str, reward: float) -> None:
        """As the view, if it is on."""
        if self._shows:
            super().show_response(prompt, response, reward)

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the step's time."""
        if step:
            now = {"wall": time.perf_counter(), "loop": time.thread_time()}
            self._steps.append({name: now[name] - began for name, began in self._began.items()})
            self._steps[-1]["painter"] = self._painting
            (self._folder / _KEPT).write_text(json.dumps(self._steps))
        super().end_step(step, metrics)

    def paint(self) -> None:
        """As the view, if it is on."""
        if self._shows:
            started = time.thread_time()
            super().paint()
            self._painting += time.thread_time() - started


def run_watched[T: LiveView](config_path: Path, overrides: list[str], make_view: Callable[[Console], T]) -> T | None:
    """Run a configuration on this rank of torchrun's; returns the view on rank 0, where it was made."""
    import torch.distributed as dist

    from megatron_fipo.config.load import load_config
    from megatron_fipo.config.run import RunConfig
    from megatron_fipo.runtime.logging import setup_logging
    from megatron_fipo.trainer.build import build_run
    from megatron_fipo.trainer.loop import train

    rank = int(os.environ["RANK"])
    config = load_config(RunConfig, config_path, overrides)
    setup_logging(rank)
    dist.init_process_group("gloo")
    view = make_view(Console(file=sys.stdout, force_terminal=True)) if rank == 0 else None
    try:
        train(build_run(config, view or NO_PROGRESS))
    finally:
        if view is not None:
            view.close()
    dist.destroy_process_group()
    return view


def compare(odd: Path, even: Path) -> None:
    """Print how much longer a step takes with the view; the first two steps warm up."""
    runs = [json.loads((folder / _KEPT).read_text()) for folder in (odd, even)]
    for name, title in (("wall", "wall time"), ("loop", "CPU time of the loop's thread")):
        # In which run a step has the view alternates; the mean over both kinds leaves out which run was the faster one.
        extra = [
            [math.log(with_view[name] / without[name]) for with_view, without in zip(*pair, strict=True)]
            for pair in ((runs[0][2::2], runs[1][2::2]), (runs[1][3::2], runs[0][3::2]))
        ]
        mean = statistics.mean(statistics.mean(kind) for kind in extra)
        error = math.sqrt(sum(statistics.variance(kind) / len(kind) for kind in extra)) / 2
        middle = statistics.mean(statistics.median(kind) for kind in extra)
        print(f"{title}: {mean:+.2%} ± {error:.2%} (standard error), median {middle:+.2%}")
    shown = [*runs[0][2::2], *runs[1][3::2]]
    share = sum(step["painter"] for step in shown) / sum(step["wall"] for step in shown)
    print(
        f"{len(shown)} steps of {statistics.mean(step['wall'] for step in shown):.3f} s; painting {share:.3%} of a core"
    )


if __name__ == "__main__":
    main()
