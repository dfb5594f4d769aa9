"""What a run is made of, as the loop sees it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.reference import ReferencePolicy
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.metrics.writer import MetricsWriter
from megatron_fipo.parallel.agreement import on_every_rank
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.stop_request import NO_STOP, StopRequest
from megatron_fipo.runtime.timing import PhaseTimer
from megatron_fipo.trainer.checkpointing import Checkpointer
from megatron_fipo.trainer.rollout_side import RolloutSide
from megatron_fipo.trainer.safeguards import Safeguards


@dataclass(slots=True, kw_only=True)
class Actor:
    """The model being trained.

    Attributes:
        bridge: Its model folder and translation.
        chunks: Model chunks of this rank, wrapped for data parallelism.
        forward: Its forward pass.
        train_step: Its updates; None in rollout-only runs.
        reference: The initial weights; None where the loss has no reference KL.
    """

    bridge: HfBridge
    chunks: list[Any]
    forward: ActorForward
    train_step: TrainStep | None
    reference: ReferencePolicy | None = None


@dataclass(slots=True)
class StepReport:
    """What is told of a step, before the weights were sent and evaluated; on ranks other than 0 the step alone.

    Attributes:
        step: The step.
        metrics: Its metrics.
        num_tokens: Prompt and response tokens of its batch.
    """

    step: int
    metrics: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Run:
    """One rank's view of a run.

    Attributes:
        config: The resolved configuration.
        context: This rank's place.
        actor: The model being trained; without optimizer in rollout-only runs.
        rollout: The generating side; None in train-only runs.
        directory: Run directory, on rank 0 alone.
        metrics_writer: Writes metrics into it and elsewhere, on rank 0 alone.
        safeguards: Looks for faults of the updates and for collapse.
        recorded: Recorded batches, one per step, in train-only runs.
        checkpointer: Writes and reads checkpoints.
        finished_steps: Steps whose updates are done.
        unreported: What is known of the last of them while its metrics are not written; None where they are.
        policy_version: Version of the actor's weights: how many steps have been applied.
        timer: Phase times of the current step.
        progress: Watches the run.
        stop: Whether it shall end.
        resources: What is closed when the run ends.
    """

    config: RunConfig
    context: ParallelContext
    actor: Actor
    directory: RunDirectory | None
    safeguards: Safeguards
    checkpointer: Checkpointer
    rollout: RolloutSide | None = None
    metrics_writer: MetricsWriter | None = None
    recorded: Sequence[Path] = ()
    finished_steps: int = 0
    unreported: StepReport | None = None
    policy_version: int = 0
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    progress: Progress = NO_PROGRESS
    stop: StopRequest = NO_STOP
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and holds the controller."""
        return self.context.rank == 0

    def require_directory(self) -> None:
        """Refuse to write where somebody has removed or replaced the run directory; collective.

        Raises:
            RunError: That has happened; raised on every rank.
        """
        directory = self.directory
        on_every_rank(lambda: None if directory is None else directory.require_here())
