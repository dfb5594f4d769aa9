"""Builds what generates: checks its inputs before the model is built, and joins it to the model afterwards."""

from collections.abc import Callable
from contextlib import ExitStack

import torch

from megatron_fipo.actor.model import unwrap
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.trainer.agreement import on_main_rank
from megatron_fipo.trainer.generation import prepare_generation
from megatron_fipo.trainer.rollout_side import EmbeddedRollouts, RolloutSide
from megatron_fipo.trainer.state import Actor
from megatron_fipo.weight_sync.in_process import InProcessSync

type MakeRollouts = Callable[[Actor], RolloutSide]
"""Joins what was prepared to the actor; collective over all ranks."""


def prepare_rollouts(config: RunConfig, bridge: HfBridge, progress: Progress, resources: ExitStack) -> MakeRollouts:
    """Check what generating needs, and start what takes long; collective over all ranks.

    Args:
        config: The run.
        bridge: The model folder.
        progress: Told of responses.
        resources: Where what has to be closed is handed over.

    Raises:
        ConfigError: An input cannot be used; raised on every rank.
        RunError: Grading did not start; raised on every rank.
    """
    positions = int(bridge.export_config(torch.float32)["max_position_embeddings"])
    generation = on_main_rank(lambda: prepare_generation(config, bridge.vocab_size, positions, resources))

    def make(actor: Actor) -> RolloutSide:
        dtype = DTYPES[config.model.dtype]
        sequences = config.rollout.max_batch_sequences
        engine = EmbeddedEngine(bridge.export_config(dtype), config.model.path, dtype, sequences, progress)
        return EmbeddedRollouts(
            engine=engine,
            weight_sync=InProcessSync(bridge, unwrap(actor.chunks), engine, config.weight_sync),
            controller=None if generation is None else generation.controller(engine, progress),
            held_out=None if generation is None else generation.held_out,
        )

    return make
