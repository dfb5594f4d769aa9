"""Where a rank is in the run, for whoever wants to know while it hangs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.runtime.progress import NO_PROGRESS, Progress

START_UP = "start_up"
"""The phase before the loop begins."""
BETWEEN_PHASES = "between_phases"


class Whereabouts(Progress):
    """Keeps what it is told, and passes it on to a watcher.

    Its values may be read from another thread at any time.

    Attributes:
        watcher: Hears the same.
        num_changes: Grows with everything that is told: as long as it does, the rank is at work.
    """

    def __init__(self, watcher: Progress = NO_PROGRESS) -> None:
        self.watcher = watcher
        self.num_changes = 0
        self._step = 0
        self._phases = [START_UP]
        self._work = self._micro_batch = (0, 0)
        self._queues: dict[str, int] = {}

    def told(self) -> dict[str, Any]:
        """What is known, as plain JSON values."""
        return {
            "step": self._step,
            "phase": self._phases[-1],
            "work": self._work,
            "micro_batch": self._micro_batch,
            "queues": self._queues,
            "changes": self.num_changes,
        }

    def begin_run(self, directory: Path, num_steps: int) -> None:
        """The loop begins."""
        self._phases = [BETWEEN_PHASES]
        self.num_changes += 1
        self.watcher.begin_run(directory, num_steps)

    def begin_step(self, step: int) -> None:
        """A step begins."""
        self._step = step
        self.num_changes += 1
        self.watcher.begin_step(step)

    def begin_phase(self, name: str) -> None:
        """A phase begins, perhaps inside another one."""
        self._phases = [*self._phases, name]
        self._work = self._micro_batch = (0, 0)
        self.num_changes += 1
        self.watcher.begin_phase(name)

    def end_phase(self, name: str, seconds: float) -> None:
        """The phase ended that began last."""
        self._phases = self._phases[:-1]
        self._work = self._micro_batch = (0, 0)
        self.num_changes += 1
        self.watcher.end_phase(name, seconds)

    def advance(self, done: int, total: int) -> None:
        """Work within the phase."""
        self._work = (done, total)
        self.num_changes += 1
        self.watcher.advance(done, total)

    def begin_micro_batch(self, number: int, total: int) -> None:
        """A micro-batch of the work begins."""
        self._micro_batch = (number, total)
        self.num_changes += 1
        self.watcher.begin_micro_batch(number, total)

    def show_queues(self, depths: Mapping[str, int]) -> None:
        """What waits where; only a change is a sign of work."""
        self.num_changes += depths != self._queues
        self._queues = dict(depths)
        self.watcher.show_queues(depths)

    def show_response(self, prompt: str, response: str, reward: float) -> None:
        """A response was scored."""
        self.num_changes += 1
        self.watcher.show_response(prompt, response, reward)

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step's metrics are written."""
        self.num_changes += 1
        self.watcher.end_step(step, metrics)

    def close(self) -> None:
        """Nothing is shown from now on."""
        self.watcher.close()
