"""What generates, as the loop sees it, and the engine that lives in the trainer's own processes."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_fipo.config.base import ConfigError
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.rollout.controller import Rollout, RolloutController
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.samples import Decode
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.stop_request import NO_STOP, StopRequest, StopRequested
from megatron_fipo.trainer.evaluation.held_out import HeldOutProblems
from megatron_fipo.weight_sync.base import WeightSync


class RolloutSide(Protocol):
    """Generates with the actor's weights. All methods are collective over all ranks."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that it has; −1 before the first sync."""
        ...

    @property
    def decode(self) -> Decode | None:
        """Token ids to text; on rank 0 alone."""
        ...

    def sync(self, policy_version: int) -> dict[str, float]:
        """Take in the actor's current weights.

        Args:
            policy_version: Their version.

        Returns:
            Metrics of the transfer; on rank 0 alone.

        Raises:
            RunError: Nothing has them; raised on every rank.
            StopRequested: The run was asked to end before there was anything to take them in; raised on every rank.
        """
        ...

    def next_rollout(self, step: int, policy_version: int) -> Rollout | None:
        """A training batch; on rank 0 alone.

        Raises:
            EndOfPrompts: They have been drawn `data.epochs` times; raised on every rank, as the others.
            RunError: See `RolloutController.next_rollout`.
            StopRequested: The run was asked to end; what was begun is given up.
        """
        ...

    def evaluate(self, folder: Path | None) -> dict[str, float]:
        """Try the held-out problems with the current weights.

        Args:
            folder: Where rank 0 has the results written.

        Returns:
            See `evaluation_metrics`; on rank 0 alone.

        Raises:
            RunError: A response could not be scored; raised on every rank.
            StopRequested: The run was asked to end; raised on every rank.
        """
        ...

    def save(self, path: Path) -> None:
        """Write down where the controller stands between two steps.

        Args:
            path: The file.

        Raises:
            CheckpointError: It cannot be written; raised on every rank.
        """
        ...

    def restore(self, step: int, path: Path | None, anew: bool, without_journal: bool) -> None:
        """Go on where an earlier run's controller stood, before anything is generated; arguments are read on rank 0.

        Args:
            step: Steps that were finished then.
            path: The file that `save` wrote; None begins at the beginning.
            anew: Whether what had been generated then is of no use, because the configuration is another.
            without_journal: Whether the journal's later batches are of no use, for the same reason.

        Raises:
            CheckpointError: The file is damaged; raised on every rank.
            ConfigError: The prompts are others, or in another order; raised on every rank.
        """
        ...

    def leave_devices(self) -> None:
        """Let the trainer have the devices it shares, for good: nothing generates from here on.

        Raises:
            RunError: Their memory does not become free; raised on every rank.
        """
        ...


@dataclass(slots=True, kw_only=True)
class EmbeddedRollouts:
    """The embedded engine and, on rank 0, the controller that drives it.

    Attributes:
        engine: This rank's engine.
        weight_sync: Feeds it.
        controller: Drives it; on rank 0 alone.
        held_out: What a run is evaluated on; on rank 0 alone, and only in a run.
        stop: Whether the run shall end.
    """

    engine: EmbeddedEngine
    weight_sync: WeightSync
    controller: RolloutController | None
    held_out: HeldOutProblems | None = None
    stop: StopRequest = NO_STOP

    @property
    def policy_version(self) -> int:
        """Version of the engine's weights."""
        return self.engine.policy_version

    @property
    def decode(self) -> Decode | None:
        """Token ids to text."""
        return None if self.controller is None else self.controller.decode

    def sync(self, policy_version: int) -> dict[str, float]:
        """Fill the engine of every rank."""
        self.weight_sync.push(policy_version)
        return {}

    def next_rollout(self, step: int, policy_version: int) -> Rollout | None:
        """A training batch."""
        return self.generate(lambda controller: controller.next_rollout(step, policy_version))

    def evaluate(self, folder: Path | None) -> dict[str, float]:
        """Try the held-out problems."""
        return self.generate(lambda controller: self._try_held_out(controller, folder)) or {}

    def save(self, path: Path) -> None:
        """Write down where the controller stands."""
        on_main_rank(lambda: asyncio.run(self._controller.save(path)))

    def restore(self, step: int, path: Path | None, anew: bool, without_journal: bool) -> None:
        """Go on where an earlier controller stood."""
        on_main_rank(lambda: self._controller.restore(step, path, anew, without_journal))

    @property
    def _controller(self) -> RolloutController:
        assert self.controller is not None, "rank 0 has it"
        return self.controller

    def leave_devices(self) -> None:
        """Nothing: the engine lies beside the actor all the time."""

    def generate[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        """Let rank 0 drive the engine while all ranks decode.

        Args:
            drive: What the controller is to do.

        Returns:
            What `drive` gives on rank 0, None elsewhere.

        Raises:
            RunError: From `drive`; raised on every rank.
            StopRequested: The run was asked to end; raised on every rank.
        """
        return on_every_rank(lambda: self._take_part(drive))

    async def _try_held_out(self, controller: RolloutController, folder: Path | None) -> dict[str, float]:
        assert self.held_out is not None and folder is not None, "rank 0 of a run has both"
        return await self.held_out.evaluate(controller, folder)

    def _take_part[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        if self.controller is None:
            self.engine.follow()
            return None
        # After any other error the ranks are out of step, and a release could wait for ever.
        try:
            result = asyncio.run(self.stop.or_work(drive(self.controller)))
        except (ConfigError, RunError, StopRequested):
            self.engine.release()
            raise
        self.engine.release()
        return result
