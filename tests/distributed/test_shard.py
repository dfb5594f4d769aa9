"""Who gets what of a rollout batch, and where its tokens end up."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.parallel.context import build_parallel_context, destroy_parallel_context
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import TrainBatch
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import random_batch

pytestmark = pytest.mark.distributed

TP = {"tensor_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}

GRIDS: dict[str, dict[str, Any]] = {"DP 4": {}, "TP 2 × DP 2": TP, "PP 2 × CP 2": PP | CP, "CP 2 × DP 2": CP}

# Replicas by data-parallel rank. Pipeline stages are far apart, tensor and context ranks side by side.
REPLICAS = {
    "DP 4": [[0], [1], [2], [3]],
    "TP 2 × DP 2": [[0, 1], [2, 3]],
    "PP 2 × CP 2": [[0, 1, 2, 3]],
    "CP 2 × DP 2": [[0, 1], [2, 3]],
}

BATCH = random_batch([9, 30, 4, 17, 1, 25, 12, 8, 40], num_mini_batches=2)

Arrived = list[list[dict[str, Any]]]


def plain(micro_batch: MicroBatch) -> dict[str, Any]:
    fields = ("token_ids", "response_mask", "response_positions", "response_targets", "response_lengths")
    fields += ("advantages", "rollout_log_probs")
    return {
        "layout": micro_batch.layout,
        "sequences": micro_batch.sequences,
        **{name: getattr(micro_batch, name) for name in fields},
    }


def shard_everywhere(grids: dict[str, dict[str, Any]], batch: TrainBatch, max_tokens: int) -> dict[str, dict[str, Any]]:
    results = {}
    for name, sizes in grids.items():
        parallelism = ParallelismConfig(max_tokens_per_micro_batch=max_tokens, **sizes)
        context = build_parallel_context(parallelism, seed=0)
        arrived = shard_micro_batches(
            batch if context.rank == 0 else None, packing_rules(parallelism), context, compute_device()
        )
        results[name] = {
            "place": (context.dp_rank, context.pp_rank, context.cp_rank, context.tp_rank),
            "replica": dist.get_process_group_ranks(context.model_parallel_group),
            "leaders": context.replica_leaders,
            "leads": context.is_replica_leader,
            "is last": context.is_pipeline_last_stage,
            "arrived": [[plain(micro_batch) for micro_batch in mini_batch] for mini_batch in arrived],
        }
        destroy_parallel_context()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    return run_distributed(shard_everywhere, 4, GRIDS, BATCH, 48)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_rank_knows_its_place(ranks, grid):
    replicas, places = REPLICAS[grid], [rank[grid]["place"] for rank in ranks]
    for number, rank in enumerate(ranks):
        dp_rank, pp_rank, _, _ = rank[grid]["place"]
        assert number in replicas[dp_rank]
        assert rank[grid]["replica"] == replicas[dp_rank]
        assert rank[grid]["leaders"] == tuple(replica[0] for replica in replicas)
        assert rank[grid]["leads"] == (number == replicas[dp_rank][0])
        assert rank[grid]["is last"] == (pp_rank == GRIDS[grid].get("pipeline_model_parallel_size", 1) - 1)
    assert len(set(places)) == 4


def by_replica(ranks: list[dict[str, dict[str, Any]]], grid: str) -> list[list[Arrived]]:
    """What arrived in every replica, by context-parallel rank; all others of a replica must have the same."""
    replicas: dict[int, dict[int, Arrived]] = {}
    for rank in ranks:
        dp_rank, _, cp_rank, _ = rank[grid]["place"]
        kept = replicas.setdefault(dp_rank, {}).setdefault(cp_rank, rank[grid]["arrived"])
        for mine, theirs in zip(rank[grid]["arrived"], kept, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert one.keys() == other.keys()
                for key, value in one.items():
                    same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
                    assert same, key
    return [[replicas[dp][cp] for cp in sorted(replicas[dp])] for dp in sorted(replicas)]


@pytest.mark.parametrize("grid", GRIDS)
def test_every_sequence_arrives_whole_in_one_replica(ranks, grid):
    replicas = by_replica(ranks, grid)
    for number in range(BATCH.num_mini_batches):
        assert len({len(arrived[0][number]) for arrived in replicas}) == 1, "replicas have as many micro-batches"
        members = [i for arrived in replicas for micro in arrived[0][number] for i in micro["sequences"]]
        assert sorted(members) == np.flatnonzero(BATCH.mini_batch_ids == number).tolist()
        for arrived in replicas:
            for parts in zip(*(cp_part[number] for cp_part in arrived), strict=True):
                assert_holds_its_sequences(list(parts))


def assert_holds_its_sequences(parts: list[dict[str, Any]]) -> None:
    """A micro-batch, joined from its context-parallel parts: entry t of a sequence is about the token at t + 1."""
    layout = parts[0]["layout"]

    def joined(name: str) -> Tensor:
        return layout.unshard([part[name].view(-1) for part in parts])

    tokens, mask = joined("token_ids"), joined("response_mask")
    targets = layout.unshard([scattered_targets(part) for part in parts])
    starts, used = layout.cu_seqlens.tolist(), torch.zeros(layout.num_tokens, dtype=torch.bool)
    for place, index in enumerate(parts[0]["sequences"]):
        source = slice(*BATCH.sequence_starts[index : index + 2])
        length = int(BATCH.sequence_lengths[index])
        here, shifted = slice(starts[place], starts[place] + length), slice(starts[place], starts[place] + length - 1)
        counts = torch.from_numpy(BATCH.response_mask[source])[1:]
        ids = torch.from_numpy(BATCH.token_ids[source]).long()
        assert torch.equal(tokens[here], ids)
        assert torch.equal(mask[shifted], counts)
        assert torch.equal(targets[shifted], torch.where(counts, ids[1:], 0))
        assert torch.equal(joined("rollout_log_probs")[shifted], torch.from_numpy(BATCH.rollout_log_probs[source])[1:])
        assert (joined("advantages")[shifted] == float(BATCH.advantages[index])).all()
        assert parts[0]["response_lengths"][place] == counts.sum()
        used[shifted] = True
    assert not mask[~used].any(), "nothing counts in padding, nor at a sequence's last token"


def scattered_targets(part: dict[str, Any]) -> Tensor:
    targets = torch.zeros(part["layout"].num_local_tokens, dtype=torch.int64)
    targets[part["response_positions"]] = part["response_targets"]
    return targets


def test_a_sequence_by_hand():
    batch = random_batch([6])
    batch.token_ids[:] = [10, 11, 12, 13, 14, 15]
    assert batch.response_mask.tolist() == [False, False, True, True, True, True]
    ranks = run_distributed(shard_everywhere, 2, {"CP 2": CP}, batch, 16)
    # Padded to 8 and cut into four chunks of two: rank 0 holds tokens 0, 1 and padding, rank 1 the middle.
    first, second = (rank["CP 2"]["arrived"][0][0] for rank in ranks)
    assert first["token_ids"].tolist() == [[10, 11, 0, 0]]
    assert first["response_mask"].tolist() == [False, True, False, False]
    assert first["response_positions"].tolist() == [1]
    assert first["response_targets"].tolist() == [12]
    assert second["token_ids"].tolist() == [[12, 13, 14, 15]]
    assert second["response_mask"].tolist() == [True, True, True, False]
    assert second["response_positions"].tolist() == [0, 1, 2]
    assert second["response_targets"].tolist() == [13, 14, 15]
    assert first["response_lengths"].tolist() == second["response_lengths"].tolist() == [4]


def world_that_does_not_divide() -> str:
    with pytest.raises(ConfigError) as caught:
        build_parallel_context(ParallelismConfig(**TP, **PP), seed=0)
    return str(caught.value)


def test_sizes_that_do_not_divide_the_world_are_refused_before_any_group_is_made():
    for message in run_distributed(world_that_does_not_divide, 2):
        assert message.startswith(
            "parallelism = tensor 2 × context 1 × pipeline 2 = 4: must divide the world: world size 2"
        )
        assert message.endswith("start a multiple of 4 ranks, or change a size")
