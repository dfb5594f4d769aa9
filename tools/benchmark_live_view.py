"""What the live view costs: alone, and in a run whose every second step goes without it.

python tools/benchmark_live_view.py
    prints the time of an event, with and without a view, and of a frame.
torchrun --standalone --nproc-per-node 4 tools/benchmark_live_view.py CONFIG.yaml [--section.field value ...]
    runs the configuration on a terminal, painting on odd steps alone, and compares each with the step after it.
"""

import io
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


def main() -> None:
    """Measure what the words ask for."""
    if len(sys.argv) > 1:
        view = run_watched(Path(sys.argv[1]), sys.argv[2:], EverySecondStep)
        if view is not None:
            report(view)
    else:
        measure_alone()


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
    """A view that hears and paints on odd steps alone; keeps every step's seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.painter_seconds = 0.0
        self._shows = False
        self._began = self._cpu_began = 0.0

    def begin_step(self, step: int) -> None:
        """Switch on or off."""
        self._shows = step % 2 == 1
        self._began, self._cpu_began = time.perf_counter(), time.thread_time()
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
            self.seconds.append(time.perf_counter() - self._began)
            self.cpu_seconds.append(time.thread_time() - self._cpu_began)
        super().end_step(step, metrics)

    def paint(self) -> None:
        """As the view, if it is on."""
        if self._shows:
            started = time.thread_time()
            super().paint()
            self.painter_seconds += time.thread_time() - started


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


def report(view: EverySecondStep) -> None:
    """Compare the two kinds of steps; the first pair warms up."""
    for name, seconds in (("wall time", view.seconds), ("CPU time of the loop's thread", view.cpu_seconds)):
        pairs = list(zip(seconds[2::2], seconds[3::2], strict=False))
        extra = [shown / without - 1 for shown, without in pairs]
        error = statistics.stdev(extra) / math.sqrt(len(extra))
        hidden = statistics.mean(without for _, without in pairs)
        print(f"{name}: {len(pairs)} pairs of steps, {hidden:.3f} s each without the view; with it")
        print(
            f"    {statistics.mean(extra):+.2%} ± {error:.2%} (standard error), median {statistics.median(extra):+.2%}"
        )
    busy = sum(view.seconds[0::2])
    print(f"painting took {view.painter_seconds / busy:.3%} of one core's time")


if __name__ == "__main__":
    main()
