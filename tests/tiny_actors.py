"""Actors built from tiny model folders on the ranks of a test, without a run around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.micro_batch import build_micro_batch
from megatron_fipo.actor.model import build_model, build_provider
from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.conversion.bridge_import import import_bridge
from megatron_fipo.parallel.context import ParallelContext, build_parallel_context, destroy_parallel_context
from megatron_fipo.parallel.packing import plan_packs
from megatron_fipo.platform.device import compute_device
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.types import TrainBatch
from tests.tiny_models import VOCAB_SIZE

# Ranks are forked: what is imported before, none of them has to import for itself.
import_bridge()


@dataclass(frozen=True)
class TinyActor:
    parallelism: ParallelismConfig
    bridge: HfBridge
    context: ParallelContext
    provider: Any
    chunks: list[Any]
    forward: ActorForward


@contextmanager
def tiny_actor(folder: Path, parallelism: dict[str, Any] | None = None, **model: Any) -> Iterator[TinyActor]:
    """Build an actor on all ranks of the world; `model` holds fields of ModelConfig, in float32 by default."""
    quiet_upstream()
    grid = ParallelismConfig(**(parallelism or {}))
    settings = ModelConfig(**{"path": folder, "dtype": "float32", **model})
    context = build_parallel_context(grid, seed=0)
    try:
        bridge = HfBridge(folder, settings.context_length, settings.rope_base)
        provider = build_provider(bridge, settings, grid, context)
        chunks = build_model(provider, bridge, grid, context)
        forward = ActorForward(chunks, provider, settings, context, bridge.vocab_size, temperature=1.0)
        yield TinyActor(grid, bridge, context, provider, chunks, forward)
    finally:
        destroy_parallel_context()


def random_batch(lengths: list[int], num_mini_batches: int = 1, seed: int = 0) -> TrainBatch:
    """Sequences of random tokens with random advantages; the first third of each is the prompt."""
    draws = np.random.default_rng(seed)
    sizes, total = np.array(lengths, dtype=np.int32), sum(lengths)
    prompts = np.maximum(sizes // 3, 1).astype(np.int32)
    mask = np.concatenate([np.arange(size) >= prompt for size, prompt in zip(sizes, prompts, strict=True)])
    numbers = np.arange(len(sizes), dtype=np.int32)
    return TrainBatch(
        token_ids=draws.integers(0, VOCAB_SIZE, total).astype(np.int32),
        sequence_lengths=sizes,
        prompt_lengths=prompts,
        response_mask=mask,
        rollout_log_probs=np.where(mask, -draws.uniform(4.0, 7.0, total), 0.0).astype(np.float32),
        rewards=np.zeros(len(sizes), dtype=np.float32),
        advantages=draws.standard_normal(len(sizes)).astype(np.float32),
        group_ids=numbers,
        mini_batch_ids=(numbers * num_mini_batches // len(sizes)).astype(np.int32),
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        temperature=1.0,
    )


def sequence_logits(actor: TinyActor, batch: TrainBatch) -> list[Tensor]:
    """Logits [L, V] of every sequence, on the last pipeline stage; elsewhere nothing. Every replica runs all."""
    lengths, context = batch.sequence_lengths.tolist(), actor.context
    ((packs,),) = plan_packs(lengths, [0] * len(lengths), 1, packing_rules(actor.parallelism))
    micro_batches = [build_micro_batch(batch, pack, context, compute_device()) for pack in packs]
    logits: dict[int, Tensor] = {}
    for pack, micro_batch, local in zip(packs, micro_batches, actor.forward.logits(micro_batches), strict=False):
        shards = [torch.empty_like(local) for _ in range(context.cp_size)]
        dist.all_gather(shards, local.contiguous(), group=context.cp_group)
        whole = micro_batch.layout.unshard(shards)
        for place, index in enumerate(pack.sequences):
            first = int(micro_batch.layout.cu_seqlens[place])
            logits[index] = whole[first : first + lengths[index]]
    return [logits[index] for index in sorted(logits)]


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes: equal where even NaN and −0 are the same."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
