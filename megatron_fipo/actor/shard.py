"""Each rank's share of a rollout batch, from the one rank that has it all."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fipo.actor.micro_batch import MicroBatch, build_micro_batch
from megatron_fipo.actor.routing import RoutingReplay
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.data.routing_file import RoutingFile, RoutingFileError
from megatron_fipo.parallel.collectives import (
    Arrays,
    broadcast_arrays,
    broadcast_json,
    gather_json,
    receive_arrays,
    send_arrays,
)
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.parallel.packing import Pack, PackingRules, PackPlan, plan_packs
from megatron_fipo.types import PER_TOKEN_FIELDS, IntArray, TrainBatch


def packing_rules(parallelism: ParallelismConfig) -> PackingRules:
    """What a legal pack looks like under this process grid."""
    interleaved = parallelism.virtual_pipeline_model_parallel_size is not None
    return PackingRules(
        max_tokens=parallelism.max_tokens_per_micro_batch,
        cp_size=parallelism.context_parallel_size,
        pack_multiple=parallelism.pack_multiple,
        micro_batch_multiple=parallelism.pipeline_model_parallel_size if interleaved else 1,
    )


def shard_micro_batches(
    batch: TrainBatch | None,
    rules: PackingRules,
    context: ParallelContext,
    device: torch.device,
    routing: RoutingReplay | None = None,
) -> list[list[MicroBatch]]:
    """Plan the packs of a rollout and build this rank's micro-batches; collective over all ranks.

    Rank 0 sends every replica its sequences once, to the replica's leader, which broadcasts them inside the replica.
    Every rank then keeps its context-parallel part. Routed experts go another way: every rank reads those of its own
    tokens and layers from the batch's routing file, which nobody needs afterwards.

    Args:
        batch: The whole batch on rank 0; None elsewhere.
        rules: What a legal pack looks like.
        context: This rank's place.
        device: Where the tensors go.
        routing: Replays the experts that the engine chose; None lets the actor's routers choose.

    Returns:
        Micro-batches by mini-batch.

    Raises:
        RoutingFileError: The experts to replay are missing or unfit; raised on every rank.
    """
    lengths: Arrays | None = None
    if batch is not None:
        lengths = {
            "sequence_lengths": batch.sequence_lengths,
            "mini_batch_ids": batch.mini_batch_ids,
            "temperature": np.array([batch.temperature], dtype=np.float64),
        }
    header = broadcast_arrays(lengths, 0)
    plan = plan_packs(header["sequence_lengths"].tolist(), header["mini_batch_ids"].tolist(), context.dp_size, rules)
    share = _receive_share(batch, plan, float(header["temperature"][0]), context)
    place = {index: number for number, index in enumerate(_share_of(plan, context.dp_rank))}
    micro_batches = [
        [_build(share, pack, place, context, device) for pack in mini_batch[context.dp_rank]] for mini_batch in plan
    ]
    if routing is not None:
        path = broadcast_json(batch and batch.routing_file and str(batch.routing_file), 0)
        problems = gather_json(_read_routing(path, header["sequence_lengths"], micro_batches, routing))
        for problem in filter(None, problems):
            raise RoutingFileError(problem)
    return micro_batches


def _read_routing(
    path: str | None, sequence_lengths: IntArray, micro_batches: list[list[MicroBatch]], routing: RoutingReplay
) -> str:
    """Give every micro-batch its experts; returns why that cannot be, or ""."""
    if path is None:
        return "the rollout has no routed experts, and rollout.replay_routing asks for them; set it to false"
    starts = np.concatenate([[0], np.cumsum(sequence_lengths, dtype=np.int64)])
    try:
        file = RoutingFile(Path(path))
        for micro_batch in (each for mini_batch in micro_batches for each in mini_batch):
            micro_batch.routed_experts = routing.read(file, starts, micro_batch.sequences, micro_batch.layout)
    except RoutingFileError as error:
        return str(error)
    return ""


def _share_of(plan: PackPlan, dp_rank: int) -> list[int]:
    """Sequences of a replica, in the order of the rollout batch."""
    return sorted(index for mini_batch in plan for pack in mini_batch[dp_rank] for index in pack.sequences)


def _build(
    share: TrainBatch, pack: Pack, place: dict[int, int], context: ParallelContext, device: torch.device
) -> MicroBatch:
    """Build a micro-batch from the share, under its sequences' numbers in the rollout batch."""
    in_share = Pack(tuple(place[index] for index in pack.sequences), pack.padded_lengths)
    return build_micro_batch(share, in_share, context, device, pack.sequences)


def _receive_share(
    batch: TrainBatch | None, plan: PackPlan, temperature: float, context: ParallelContext
) -> TrainBatch:
    mine: Arrays | None = None
    if batch is not None:
        for dp_rank, leader in enumerate(context.replica_leaders):
            arrays = _select(batch, _share_of(plan, dp_rank))
            if leader == context.rank:
                mine = arrays
            else:
                send_arrays(arrays, leader)
    elif context.is_replica_leader:
        mine = receive_arrays(0)
    leader = context.replica_leaders[context.dp_rank]
    received: dict[str, Any] = broadcast_arrays(mine, leader, context.model_parallel_group)
    return TrainBatch(**received, temperature=temperature)


def _select(batch: TrainBatch, sequences: Sequence[int]) -> dict[str, Any]:
    """Arrays of some of a batch's sequences."""
    starts = batch.sequence_starts
    selected: dict[str, Any] = {}
    for field in dataclasses.fields(TrainBatch):
        values = getattr(batch, field.name)
        if field.name in ("temperature", "routing_file"):
            continue
        if field.name in PER_TOKEN_FIELDS:
            pieces = [values[starts[index] : starts[index + 1]] for index in sequences]
            selected[field.name] = np.concatenate(pieces) if pieces else values[:0]
        else:
            selected[field.name] = values[list(sequences)]
    return selected
