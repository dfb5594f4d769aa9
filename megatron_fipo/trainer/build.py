"""Builds a run from its configuration; the only place where concrete classes are chosen."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.model import build_model, build_provider, unwrap
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.reference import ReferencePolicy
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.algorithm_card import CARD_FILE, effective_algorithm
from megatron_fipo.config.base import require
from megatron_fipo.config.load import dump_config, plain_values
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.data.evaluation import load_evaluation_prompts
from megatron_fipo.data.stream import PromptStream
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.metrics.writer import MetricsWriter, check_sinks, open_sinks
from megatron_fipo.parallel.context import ParallelContext, build_parallel_context
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.rewards.check import check_prompts
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.batch import batch_path, load_recorded
from megatron_fipo.rollout.controller import BatchRecipe, RolloutController
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import RolloutEngine
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.runtime.timing import PhaseTimer
from megatron_fipo.trainer.agreement import on_every_rank, on_main_rank
from megatron_fipo.trainer.evaluation.problems import select_prompts
from megatron_fipo.trainer.generation_inputs import check_positions, training_sampling
from megatron_fipo.trainer.rollout_side import RolloutSide
from megatron_fipo.trainer.state import Actor, Run
from megatron_fipo.types import Prompt
from megatron_fipo.weight_sync.in_process import InProcessSync

logger = logging.getLogger(__name__)


def build_run(config: RunConfig, progress: Progress = NO_PROGRESS) -> Run:
    """Check the inputs, then build everything; collective over all ranks, after the process group has started.

    Args:
        config: The run.
        progress: Watches it; nothing but `NO_PROGRESS` on ranks other than 0.

    Raises:
        ConfigError: An input cannot be used; raised on every rank, before the model is built.
    """
    with ExitStack() as resources:
        run = _build(config, progress, resources)
        run.resources = resources.pop_all()
    return run


def _build(config: RunConfig, progress: Progress, resources: ExitStack) -> Run:
    context = build_parallel_context(config.parallelism, derive_seed(config.seed, "model"))
    on_main_rank(lambda: RunDirectory.check(config.output_dir))
    on_main_rank(lambda: check_sinks(config.metrics))
    # Every node has its own view of the model folder.
    bridge = on_every_rank(lambda: HfBridge(config.model.path, config.model.context_length, config.model.rope_base))
    generates = config.mode != "train_only"
    make_controller = on_main_rank(lambda: _prepare_generation(config, bridge, resources)) if generates else None
    recorded = on_main_rank(lambda: _find_recorded(config, bridge)) if not generates else None
    actor = _build_actor(config, bridge, context)
    directory = on_main_rank(lambda: RunDirectory.create(config.output_dir, dump_config(config)))
    metrics_writer = on_main_rank(lambda: resources.enter_context(closing(_open_writer(config, directory))))
    if directory is not None:
        card = effective_algorithm(config.algorithm)
        directory.write(CARD_FILE, card + "\n")
        logger.info("effective algorithm:\n%s", card)
    rollout = None
    if generates:
        dtype = DTYPES[config.model.dtype]
        engine = EmbeddedEngine(
            bridge.export_config(dtype),
            config.model.path,
            dtype,
            config.rollout.max_batch_sequences,
            progress,
        )
        sync = InProcessSync(bridge, unwrap(actor.chunks), engine, config.weight_sync)
        controller, evaluation_prompts = make_controller(engine, progress) if make_controller else (None, ())
        rollout = RolloutSide(
            engine=engine, weight_sync=sync, controller=controller, evaluation_prompts=evaluation_prompts
        )
    return Run(
        config=config,
        context=context,
        actor=actor,
        rollout=rollout,
        directory=directory,
        metrics_writer=metrics_writer,
        recorded=recorded or (),
        timer=PhaseTimer(progress),
        progress=progress,
    )


def _open_writer(config: RunConfig, directory: RunDirectory | None) -> MetricsWriter:
    assert directory is not None, "rank 0 has the run directory"
    return MetricsWriter(directory, open_sinks(config.metrics, directory.path, plain_values(config)))


def _prepare_generation(
    config: RunConfig, bridge: HfBridge, resources: ExitStack
) -> Callable[[RolloutEngine, Progress], tuple[RolloutController, Sequence[Prompt]]]:
    """Load tokenizer and prompts, start grading; returns what makes an engine's controller and held-out prompts."""
    data = config.data
    assert data is not None, "RunConfig demands prompts of every mode that generates"
    positions = int(bridge.export_config(torch.float32)["max_position_embeddings"])
    check_positions(data.max_prompt_tokens, config.rollout, positions)
    tokenizer = load_tokenizer(config.model.path, bridge.vocab_size)
    stream = PromptStream(data, tokenizer, derive_seed(config.seed, "prompts"))
    check_prompts(config.reward, [prompt for first in stream.first_prompts.values() for prompt in first], "data.train")
    _check_epochs(config, stream)
    held_out: tuple[Prompt, ...] = ()
    if data.has_evaluation:
        usable = load_evaluation_prompts(data, tokenizer, limit=config.evaluation.num_prompts, stream=stream)
        check_prompts(config.reward, usable, "data.evaluation")
        held_out = select_prompts(usable, config.evaluation.num_prompts)
    sampling = training_sampling(config.rollout, config.model.path, tokenizer)
    pool = resources.enter_context(RewardPool(config.reward, config.rollout.max_response_tokens))

    def make(engine: RolloutEngine, progress: Progress) -> tuple[RolloutController, Sequence[Prompt]]:
        controller = RolloutController(
            engine=engine,
            scoring=Scoring(pool, config.reward.on_error),
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
            config=config.rollout,
            sampling=sampling,
            seed=config.seed,
            recipe=BatchRecipe(stream=stream, algorithm=config.algorithm, num_records=config.metrics.samples_per_step),
            progress=progress,
        )
        return controller, held_out

    return make


def _check_epochs(config: RunConfig, stream: PromptStream) -> None:
    needed = config.num_steps * config.rollout.num_prompts_per_step
    require(
        needed <= stream.most_prompts,
        field="data.epochs",
        value=config.data.epochs if config.data else None,
        rule=f"gives at most {stream.most_prompts:,.0f} prompts, and num_steps = {config.num_steps} need {needed:,}",
        way_out="allow more epochs, or set it to null",
    )


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
    load_recorded(paths[0], config, bridge.vocab_size)
    return paths


def _build_actor(config: RunConfig, bridge: HfBridge, context: ParallelContext) -> Actor:
    provider = build_provider(bridge, config.model, config.parallelism, context)
    chunks = build_model(provider, bridge, config.parallelism, context)
    forward = ActorForward(chunks, provider, config.model, context, bridge.vocab_size, config.rollout.temperature)
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
