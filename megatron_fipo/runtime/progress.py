"""How the loop tells a watcher what happens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Progress:
    """A watcher of the run that watches nothing; others override what they want to hear.

    Its methods are called between pieces of work, so they return at once and never fail.
    """

    def begin_run(self, directory: Path, num_steps: int) -> None:
        """The loop begins.

        Args:
            directory: The run directory.
            num_steps: Steps of the whole run.
        """

    def begin_step(self, step: int) -> None:
        """A step begins, counted from 1; what comes before the first belongs to step 0."""

    def begin_phase(self, name: str) -> None:
        """A phase begins, by the name of its time in the metrics."""

    def end_phase(self, name: str, seconds: float) -> None:
        """A phase ended after so many seconds."""

    def advance(self, done: int, total: int) -> None:
        """Work within the phase: responses that are finished, or mini-batches; 0 begins a new count."""

    def begin_micro_batch(self, number: int, total: int) -> None:
        """A micro-batch of the work begins, counted from 1 on this rank and model chunk by model chunk."""

    def show_queues(self, depths: Mapping[str, int]) -> None:
        """How much waits where: requests, responses and groups by what they wait for."""

    def show_response(self, prompt: str, response: str, reward: float) -> None:
        """A response was scored."""

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step's metrics are written."""

    def close(self) -> None:
        """Show nothing any more; may come from any thread, and more than once."""


NO_PROGRESS = Progress()
