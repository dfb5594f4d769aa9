"""What a watcher knows about a running run, and what it expects of the time that is left."""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.runtime.progress import Progress

_REMEMBERED_STEPS = 5
_REMEMBERED_REWARDS = 200
_REMEMBERED_LINES = 500


@dataclass(slots=True)
class View:
    """Everything a screen shows; times are readings of one clock, in seconds.

    Attributes:
        name: The run's name.
        num_steps: Steps of the whole run.
        step: The current one; 0 before the first.
        begun: When the run, the step and the phase began.
        phase: The current phase, or "".
        counts: Work of this step's phases: done and total.
        spent: Seconds of this step's finished phases.
        history: Phase times of the latest finished steps, "" for the whole step.
        metrics: Of the latest finished step.
        evaluation: Metrics of the latest evaluation.
        rewards: Mean reward of the latest steps.
        response: Prompt, response and reward of the latest response.
        lines: The latest log lines.
    """

    name: str = ""
    num_steps: int = 0
    step: int = 0
    begun: dict[str, float] = field(default_factory=dict)
    phase: str = ""
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    history: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_STEPS))
    metrics: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_REWARDS))
    response: tuple[str, str, float] | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_LINES))

    def step_left(self, now: float) -> float | None:
        """Seconds that the current step still needs, or None before there is a step to compare it with."""
        if not self.history or not self.step:
            return None
        usual = self._usual()
        total = usual.pop("")
        left = sum(seconds for name, seconds in usual.items() if name not in self.spent and name != self.phase)
        # What the phases do not account for: assembling the batch, writing files.
        between = max(total - sum(usual.values()), 0.0)
        return left + self._phase_left(usual.get(self.phase, 0.0), now) + between * bool(left)

    def run_left(self, now: float) -> float | None:
        """Seconds that the run still needs, its export left out; None before a step has ended."""
        step = self.step_left(now)
        return None if step is None else step + (self.num_steps - self.step) * self._usual()[""]

    def _usual(self) -> dict[str, float]:
        """Mean time of every phase over the latest steps; one that a step went without counts as 0 in it."""
        names = {name for step in self.history for name in step}
        return {name: sum(step.get(name, 0.0) for step in self.history) / len(self.history) for name in names}

    def _phase_left(self, usual: float, now: float) -> float:
        if not self.phase:
            return 0.0
        elapsed = now - self.begun["phase"]
        done, total = self.counts.get(self.phase, (0, 0))
        if 0 < done <= total:
            return elapsed * (total - done) / done
        return max(usual - elapsed, 0.0)


class LiveState(Progress):
    """Hears what the loop tells and keeps what a screen needs of it.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._view = View()
        self._lock = threading.Lock()

    def view(self) -> View:
        """The state of this moment; later events do not change it."""
        with self._lock:
            seen = copy.copy(self._view)
            for name in ("begun", "counts", "spent", "history", "rewards", "lines"):
                setattr(seen, name, getattr(seen, name).copy())
        return seen

    def begin_run(self, directory: Path, num_steps: int) -> None:
        """Remember name and length."""
        with self._lock:
            self._view.name, self._view.num_steps = directory.name, num_steps
            self._view.begun.update(run=self.clock(), step=self.clock())

    def begin_step(self, step: int) -> None:
        """Begin new counts."""
        with self._lock:
            view = self._view
            view.step, view.phase = step, ""
            view.counts.clear()
            view.spent.clear()
            view.begun["step"] = self.clock()

    def begin_phase(self, name: str) -> None:
        """Remember what is done now."""
        with self._lock:
            self._view.phase = name
            self._view.begun["phase"] = self.clock()

    def end_phase(self, name: str, seconds: float) -> None:
        """Remember how long it took."""
        with self._lock:
            self._view.phase = ""
            self._view.spent[name] = self._view.spent.get(name, 0.0) + seconds

    def advance(self, done: int, total: int) -> None:
        """Remember the count; within one count it never falls."""
        with self._lock:
            view = self._view
            before, of = view.counts.get(view.phase, (0, total))
            view.counts[view.phase] = (max(done, before) if done and of == total else done, total)

    def show_response(self, prompt: str, response: str, reward: float) -> None:
        """Remember the latest."""
        self._view.response = (prompt, response, reward)

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Remember the step's metrics and times."""
        with self._lock:
            view = self._view
            if step:
                view.metrics = metrics
                view.history.append({"": self.clock() - view.begun["step"], **view.spent})
            if "rollout/reward_mean" in metrics:
                view.rewards.append(metrics["rollout/reward_mean"])
            if "eval/accuracy" in metrics:
                view.evaluation = metrics

    def add_line(self, line: str) -> None:
        """Remember a log line."""
        with self._lock:
            self._view.lines.append(line)
