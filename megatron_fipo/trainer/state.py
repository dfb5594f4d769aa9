"""What a run is made of, as the loop sees it."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.timing import PhaseTimer
from megatron_fipo.trainer.agreement import on_every_rank
from megatron_fipo.types import Prompt
from megatron_fipo.weight_sync.base import WeightSync


@dataclass(slots=True, kw_only=True)
class Actor:
    """The model being trained.

    Attributes:
        bridge: Its model folder and translation.
        chunks: Model chunks of this rank, wrapped for data parallelism.
        forward: Its forward pass.
        train_step: Its updates; None in rollout-only runs.
    """

    bridge: HfBridge
    chunks: list[Any]
    forward: ActorForward
    train_step: TrainStep | None


@dataclass(slots=True, kw_only=True)
class RolloutSide:
    """Everything that generates; absent in train-only runs.

    Attributes:
        engine: This rank's engine.
        weight_sync: Feeds it.
        controller: Drives it; on rank 0 alone.
        evaluation_prompts: Held-out prompts, on rank 0 alone.
    """

    engine: EmbeddedEngine
    weight_sync: WeightSync
    controller: RolloutController | None
    evaluation_prompts: Sequence[Prompt] = ()

    def generate[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        """Let rank 0 drive the engine while all ranks decode; collective over all ranks.

        Args:
            drive: What the controller is to do.

        Returns:
            What `drive` gives on rank 0, None elsewhere.

        Raises:
            RunError: From `drive`; raised on every rank.
        """
        return on_every_rank(lambda: self._take_part(drive))

    def _take_part[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        if self.controller is None:
            self.engine.follow()
            return None
        # After any other error the ranks are out of step, and a release could wait for ever.
        try:
            result = asyncio.run(drive(self.controller))
        except RunError:
            self.engine.release()
            raise
        self.engine.release()
        return result


@dataclass(slots=True, kw_only=True)
class Run:
    """One rank's view of a run.

    Attributes:
        config: The resolved configuration.
        context: This rank's place.
        actor: The model being trained; without optimizer in rollout-only runs.
        rollout: The generating side; None in train-only runs.
        directory: Run directory, on rank 0 alone.
        recorded: Recorded batches, one per step, in train-only runs.
        policy_version: Version of the actor's weights: how many steps have been applied.
        timer: Phase times of the current step.
        progress: Watches the run, on rank 0 alone.
        resources: What is closed when the run ends.
    """

    config: RunConfig
    context: ParallelContext
    actor: Actor
    rollout: RolloutSide | None
    directory: RunDirectory | None
    recorded: Sequence[Path] = ()
    policy_version: int = 0
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    progress: Progress = NO_PROGRESS
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and holds the controller."""
        return self.context.rank == 0
