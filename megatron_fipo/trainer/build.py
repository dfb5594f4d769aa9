"""Builds a run from its configuration; concrete classes are chosen here and in `prepare_rollouts` alone."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from megatron_fipo.actor.checkpoint import ActorCheckpoint
from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.model import build_model, build_provider
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.reference import ReferencePolicy
from megatron_fipo.actor.routing import RoutingReplay, require_replayable
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.algorithm_card import CARD_FILE, effective_algorithm
from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.config.load import dump_config, plain_values
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.run_changes import touch_samples
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.conversion.model_files import check_tied_output
from megatron_fipo.metrics.writer import MetricsWriter, check_sinks, open_sinks
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.parallel.context import ParallelContext, build_parallel_context
from megatron_fipo.rollout.batch import batch_path, load_recorded
from megatron_fipo.runtime.earlier_run import check_against_earlier
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.run_lock import hold_run_directory
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.runtime.stop_request import NO_STOP, StopRequest
from megatron_fipo.runtime.timing import PhaseTimer
from megatron_fipo.trainer.checkpointing import Checkpointer, check_best_metric
from megatron_fipo.trainer.prepare_rollouts import prepare_rollouts
from megatron_fipo.trainer.recovery import restore_actor, restore_files
from megatron_fipo.trainer.safeguards import Safeguards
from megatron_fipo.trainer.same_configuration import require_same_configuration
from megatron_fipo.trainer.state import Actor, Run

logger = logging.getLogger(__name__)


def build_run(config: RunConfig, progress: Progress = NO_PROGRESS, stop: StopRequest = NO_STOP) -> Run:
    """Check the inputs, then build everything; collective over all ranks, after the process group has started.

    Args:
        config: The run.
        progress: Watches it.
        stop: Whether it shall end.

    Raises:
        ConfigError: An input cannot be used; raised on every rank, before the model is built.
    """
    # What has begun is ended before the directory goes.
    with ExitStack() as beginnings, ExitStack() as resources:
        run = _build(config, progress, stop, resources, beginnings)
        run.resources = resources.pop_all()
        beginnings.pop_all()
    return run


def _build(
    config: RunConfig, progress: Progress, stop: StopRequest, resources: ExitStack, beginnings: ExitStack
) -> Run:
    """Build a run.

    Args:
        config: The run.
        progress: Watches it.
        stop: Whether it shall end.
        resources: Is given what has to be closed when the run has ended.
        beginnings: Is given what is undone where the run does not come about.
    """
    require_same_configuration(config)
    context = build_parallel_context(config.parallelism, derive_seed(config.seed, "model"))
    taken = on_main_rank(lambda: _take_directory(config, resources, beginnings))
    directory, is_changed = taken or (None, False)
    has_run, is_changed = (any(gather_json(each)) for each in (directory is not None and directory.has_run, is_changed))
    on_main_rank(lambda: check_sinks(config.metrics))
    on_main_rank(lambda: check_best_metric(config.checkpoint))
    # Every node has its own view of the model folder.
    bridge = on_every_rank(lambda: HfBridge(config.model.path, config.model.context_length, config.model.rope_base))
    on_main_rank(lambda: check_tied_output(config.model.path))
    generates = config.mode != "train_only"
    start_rollouts = prepare_rollouts(config, bridge, progress, stop, resources) if generates else None
    recorded = on_main_rank(lambda: _find_recorded(config, bridge)) if not generates else None
    if not has_run:
        on_main_rank(lambda: RunDirectory.begin(config.output_dir, dump_config(config)))
    # Servers become ready while the model is built.
    make_rollouts = None if start_rollouts is None else start_rollouts()
    actor = build_actor(config, bridge, context)
    actor.forward.progress = progress
    run = Run(
        config=config,
        context=context,
        actor=actor,
        directory=directory,
        checkpointer=_build_checkpointer(config, context, actor),
        safeguards=Safeguards(config, actor.train_step, context.rank == 0),
        recorded=recorded or (),
        timer=PhaseTimer(progress),
        progress=progress,
        stop=stop,
    )
    # Servers on the trainer's devices get its memory: the actor is loaded before.
    has_checkpoint = has_run and restore_actor(run)
    if make_rollouts is not None:
        run.rollout = make_rollouts(actor, context)
    if has_run:
        restore_files(run, has_checkpoint, is_changed)
        on_main_rank(lambda: RunDirectory.begin(config.output_dir, dump_config(config)))
    on_main_rank(lambda: _tell_algorithm(config, directory))
    run.metrics_writer = on_main_rank(lambda: resources.enter_context(closing(_open_writer(run))))
    return run


def _tell_algorithm(config: RunConfig, directory: RunDirectory | None) -> None:
    assert directory is not None, "rank 0 has it"
    card = effective_algorithm(config.algorithm)
    directory.write(CARD_FILE, card + "\n")
    logger.info("effective algorithm:\n%s", card)


def _take_directory(config: RunConfig, resources: ExitStack, beginnings: ExitStack) -> tuple[RunDirectory, bool]:
    """Hold the run directory alone, and see that the run may begin in it, or go on.

    Returns:
        The directory, and whether the run goes on with changes that its samples depend on.
    """
    RunDirectory.check(config.output_dir, may_have_run=config.checkpoint.resume)
    is_here = resources.enter_context(hold_run_directory(config.output_dir))
    directory = RunDirectory(config.output_dir, is_here)
    directory.remove_remnants()
    if not directory.has_run:
        beginnings.enter_context(_removed_if_refused(directory))
    changes = check_against_earlier(config, directory)
    for change in changes:
        logger.warning("not as in the run's configuration: %s", change)
    return directory, touch_samples(changes)


def _build_checkpointer(config: RunConfig, context: ParallelContext, actor: Actor) -> Checkpointer:
    checkpoint = None
    if actor.train_step is not None:
        checkpoint = ActorCheckpoint(actor.chunks, actor.train_step.optimizer, context)
    return Checkpointer(config.checkpoint, context, checkpoint, RunDirectory(config.output_dir).checkpoints)


@contextmanager
def _removed_if_refused(directory: RunDirectory) -> Iterator[None]:
    """Leave no run directory behind where an input cannot be used: a run cannot begin in one that another has begun."""
    try:
        yield
    except (ConfigError, RunError) as error:
        # Once a run has begun, what its servers wrote tells more than the error.
        if isinstance(error, ConfigError) or not directory.has_run:
            directory.remove()
        raise


def _open_writer(run: Run) -> MetricsWriter:
    assert run.directory is not None, "rank 0 has the run directory"
    first_step = run.finished_steps + (run.finished_steps > 0 and run.unreported is None)
    sinks = open_sinks(run.config.metrics, run.directory.path, plain_values(run.config), first_step)
    return MetricsWriter(run.directory, sinks)


def _find_recorded(config: RunConfig, bridge: HfBridge) -> list[Path]:
    """Files of all steps; the first is read, since recordings of one folder are of one kind."""
    assert config.recorded_rollouts is not None, "RunConfig demands the folder in train_only"
    paths = [batch_path(config.recorded_rollouts, step) for step in range(1, config.num_steps + 1)]
    require(
        paths[0].is_file(),
        field="recorded_rollouts",
        value=config.recorded_rollouts,
        rule=f"must hold recorded rollouts, and there is no {paths[0].name} in it",
        way_out="name the rollouts/ folder of a rollout_only run",
    )
    for step, path in enumerate(paths, start=1):
        require(
            path.is_file(),
            field="num_steps",
            value=config.num_steps,
            rule=f"must not exceed the recorded rollouts: {path} for step {step} does not exist",
            way_out="lower num_steps, or record more with mode rollout_only",
        )
    load_recorded(paths[0], config, bridge.vocab_size, step=1)
    return paths


def build_actor(config: RunConfig, bridge: HfBridge, context: ParallelContext) -> Actor:
    """Build the model being trained, with the model folder's weights, and what runs it; collective over all ranks.

    Args:
        config: The run.
        bridge: Its model folder.
        context: This rank's place.

    Raises:
        ConfigError: The model cannot be used with these settings; raised on every rank.
    """
    provider = build_provider(bridge, config.model, config.parallelism, context)
    if config.rollout.replay_routing:
        require_replayable(provider)
    chunks = build_model(provider, bridge, config.parallelism, context)
    routing = RoutingReplay(chunks, provider, context) if config.rollout.replay_routing else None
    forward = ActorForward(
        chunks, provider, config.model, context, bridge.vocab_size, config.rollout.temperature, routing
    )
    train_step = reference = None
    if config.mode != "rollout_only":
        # While the weights are still those of the model folder.
        if config.algorithm.reference_kl_coefficient > 0:
            reference = ReferencePolicy(chunks)
        optimizer = ActorOptimizer(chunks, config.optimizer, provider.bf16)
        train_step = TrainStep(forward, optimizer, config.algorithm, context, config.metrics.quantiles)
    _log_size(context, chunks)
    if reference is not None and context.rank == 0:
        logger.info("reference policy: %.2f GiB of host memory on this rank", reference.num_bytes / 1024**3)
    return Actor(bridge=bridge, chunks=chunks, forward=forward, train_step=train_step, reference=reference)


def _log_size(context: ParallelContext, chunks: list[Any]) -> None:
    if context.rank == 0:
        count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        logger.info(
            "actor: %.2f M parameters on this rank; %d ranks = tensor %d × context %d × pipeline %d × data %d",
            count / 1e6,
            context.world_size,
            context.tp_size,
            context.cp_size,
            context.pp_size,
            context.dp_size,
        )
