"""Builds what generates: checks its inputs and starts servers before the model is built, and joins it to the model."""

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import torch

from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.offload import ActorMemory
from megatron_fipo.actor.routing import moe_layers
from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.load import plain_values
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.servers.pool import TrainerRanks
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.stop_request import StopRequest
from megatron_fipo.trainer.colocation import Colocation, ServerMemory
from megatron_fipo.trainer.controller_calls import ControllerCalls
from megatron_fipo.trainer.controller_link import ControllerLink
from megatron_fipo.trainer.generation import decoder, prepare_generation
from megatron_fipo.trainer.rollout_side import EmbeddedRollouts, RolloutSide
from megatron_fipo.trainer.served_rollouts import ServedRollouts
from megatron_fipo.trainer.state import Actor
from megatron_fipo.weight_sync.base import WeightTransport
from megatron_fipo.weight_sync.canary import Canary, canary_token_ids
from megatron_fipo.weight_sync.disk import DiskTransport
from megatron_fipo.weight_sync.distributed import DistributedTransport
from megatron_fipo.weight_sync.in_process import InProcessSync
from megatron_fipo.weight_sync.server_calls import ServerCalls
from megatron_fipo.weight_sync.tensor import TensorTransport
from megatron_fipo.weight_sync.verification import WeightVerification

type MakeRollouts = Callable[[Actor, ParallelContext], RolloutSide]
"""Joins what was prepared to the actor; collective over all ranks."""

type StartRollouts = Callable[[], MakeRollouts]
"""Starts servers, which take a while, once there is a run directory; collective over all ranks."""


def prepare_rollouts(
    config: RunConfig, bridge: HfBridge, progress: Progress, stop: StopRequest, resources: ExitStack
) -> StartRollouts:
    """Check what generating needs; collective over all ranks.

    Args:
        config: The run.
        bridge: The model folder.
        progress: Told of responses.
        stop: Breaks generation off.
        resources: Where what has to be closed is handed over.

    Raises:
        ConfigError: An input cannot be used; raised on every rank.
        RunError: Grading or the controller did not start; raised on every rank.
    """
    prepare = _prepare_served if config.rollout.engine == "sglang" else _prepare_embedded
    return prepare(config, bridge, progress, stop, resources)


def _prepare_embedded(
    config: RunConfig, bridge: HfBridge, progress: Progress, stop: StopRequest, resources: ExitStack
) -> StartRollouts:
    generation = on_main_rank(lambda: prepare_generation(config, bridge.vocab_size, _num_positions(bridge), resources))

    def make(actor: Actor, context: ParallelContext) -> RolloutSide:
        dtype = DTYPES[config.model.dtype]
        sequences = config.rollout.max_batch_sequences
        engine = EmbeddedEngine(bridge.export_config(dtype), config.model.path, dtype, sequences, progress, stop)
        return EmbeddedRollouts(
            engine=engine,
            weight_sync=InProcessSync(bridge, unwrap(actor.chunks), engine, config.weight_sync),
            controller=None if generation is None else generation.controller(engine, progress),
            held_out=None if generation is None else generation.held_out,
            stop=stop,
        )

    return lambda: make


def _prepare_served(
    config: RunConfig, bridge: HfBridge, progress: Progress, stop: StopRequest, resources: ExitStack
) -> StartRollouts:
    link = on_main_rank(lambda: resources.enter_context(closing(ControllerLink())))
    calls = ControllerCalls(link, progress, stop=stop)
    inputs = {"config": plain_values(config), "vocab_size": bridge.vocab_size, "positions": _num_positions(bridge)}
    calls.ask("prepare", inputs)
    tokenizer = on_every_rank(lambda: load_tokenizer(config.model.path, bridge.vocab_size))

    def start_servers() -> None:
        calls.ask("start_servers", {"ranks": asdict(TrainerRanks.of_launcher(os.environ))})

    def start() -> MakeRollouts:
        if not config.rollout.colocated:
            start_servers()
        return make

    def make(actor: Actor, context: ParallelContext) -> RolloutSide:
        colocation = _build_colocation(actor) if config.rollout.colocated else None
        if colocation is not None:
            colocation.vacate()
            start_servers()
        routing = _routing_shape(actor.forward.provider) if config.rollout.replay_routing else None
        told, _ = calls.ask("start_engine", {"routing": routing})
        server_calls = ServerCalls(broadcast_json(told, 0)["api_key"])
        resources.callback(server_calls.close)
        if colocation is not None and context.rank == 0:
            colocation.engine = ServerMemory(server_calls, config.weight_sync.timeout_s)
        assert config.data is not None, "RunConfig demands prompts of every mode that generates"
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        token_ids = canary_token_ids(bridge.vocab_size, tokenizer.all_special_ids, longest)
        canary = Canary(token_ids, actor.forward, packing_rules(config.parallelism), context)
        return ServedRollouts(
            calls=calls,
            transport=_build_transport(config, actor, context, server_calls, resources),
            verification=WeightVerification(canary, config.weight_sync, config.model.dtype, server_calls),
            decode=decoder(tokenizer) if context.rank == 0 else None,
            colocation=colocation,
        )

    return start


def _num_positions(bridge: HfBridge) -> int:
    return int(bridge.export_config(torch.float32)["max_position_embeddings"])


def _routing_shape(provider: Any) -> dict[str, Any]:
    """The fields of a `RoutingShape`."""
    return {
        "num_layers": provider.num_layers,
        "moe_layers": moe_layers(provider),
        "num_experts": provider.num_moe_experts,
        "experts_per_token": provider.moe_router_topk,
    }


def _build_transport(
    config: RunConfig, actor: Actor, context: ParallelContext, calls: ServerCalls, resources: ExitStack
) -> WeightTransport:
    bridge, model, sync = actor.bridge, unwrap(actor.chunks), config.weight_sync
    kind = sync.transport if sync.transport != "auto" else ("tensor" if config.rollout.colocated else "distributed")
    if kind == "disk":
        folder = sync.folder or RunDirectory(config.output_dir).weights
        return DiskTransport(bridge, model, context, folder, sync, calls)
    if kind == "tensor":
        return TensorTransport(bridge, model, sync, calls)
    return resources.enter_context(closing(DistributedTransport(bridge, model, context, sync, calls)))


def _build_colocation(actor: Actor) -> Colocation:
    """Without servers' memory, which is there once they are."""
    optimizer = None if actor.train_step is None else actor.train_step.optimizer
    return Colocation(ActorMemory(actor.chunks, optimizer), None)
