"""Every transport into the real server: the same bits as a folder gives it, and the actor's log-probabilities."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.sglang.client import SglangServer
from megatron_fipo.weight_sync.base import WeightTransport
from megatron_fipo.weight_sync.canary import Canary, canary_token_ids
from megatron_fipo.weight_sync.disk import DiskTransport
from megatron_fipo.weight_sync.distributed import DistributedTransport
from megatron_fipo.weight_sync.server_calls import ServerCalls
from megatron_fipo.weight_sync.tensor import TensorTransport
from megatron_fipo.weight_sync.verification import WeightVerification
from tests.distributed_helpers import run_distributed
from tests.sglang_servers import needs_sglang
from tests.tiny_actors import TinyActor, random_batch, sequence_logits, tiny_actor
from tests.tiny_models import EOS_TOKEN_ID

pytestmark = [pytest.mark.distributed, needs_sglang]

TIMEOUT_S = 600.0
PROMPT = [72, 101, 108, 108, 111]
NUM_GENERATED = 12
PP = {"pipeline_model_parallel_size": 2}


def transport_of(kind: str, actor: TinyActor, config: WeightSyncConfig, calls: ServerCalls) -> WeightTransport:
    model = unwrap(actor.chunks)
    if kind == "distributed":
        return DistributedTransport(actor.bridge, model, actor.context, config, calls)
    if kind == "disk":
        assert config.folder is not None
        return DiskTransport(actor.bridge, model, actor.context, config.folder, config, calls)
    return TensorTransport(actor.bridge, model, config, calls)


async def restart_from(server: SglangServer, folder: Path) -> list[dict[str, str]]:
    """Have the server read a folder's weights, and give their checksums."""
    await server.update_weights_from_disk(str(folder), TIMEOUT_S)
    await server.flush_cache(TIMEOUT_S)
    return await server.checksums(TIMEOUT_S)


def push_kinds(kinds: list[str], server: dict[str, Any], scratch: Path) -> list[dict[str, Any]]:
    """Push the other model's weights by each transport; what the server has and says before and after."""
    outcomes = []
    config = WeightSyncConfig(bucket_mib=1, timeout_s=TIMEOUT_S, folder=scratch)
    address = ServerAddress(name="real", url=server["url"], tensor_parallel_size=1, policy_version=-1)
    with tiny_actor(server["other_model"], PP) as actor:
        calls = ServerCalls(server["api_key"])
        token_ids = canary_token_ids(actor.bridge.vocab_size, {EOS_TOKEN_ID}, longest=64)
        canary = Canary(token_ids, actor.forward, packing_rules(actor.parallelism), actor.context)
        verification = WeightVerification(canary, config, "float32", calls)
        for version, kind in enumerate(kinds, start=1):
            outcome: dict[str, Any] = {}
            transport = transport_of(kind, actor, config, calls)
            if dist.get_rank() == 0:
                outcome["start"] = calls.start(address, lambda s: restart_from(s, server["model"])).result()
                outcome["log probs before"] = log_probs(calls, address, canary)
                outcome["greedy before"] = calls.start(address, greedy).result()
            verification.expect()
            outcome["push"] = transport.push(version, [address])
            outcome["check"] = verification.check(version, [address])
            if dist.get_rank() == 0:
                outcome["greedy"] = calls.start(address, greedy).result()
            # The actor scores what the server chose; the last stage, rank 1 of 2, has the logits.
            chosen = broadcast_json(outcome.get("greedy"), 0)
            outcome |= most_likely(actor, chosen)
            if dist.get_rank() == 0:
                outcome["pushed"] = calls.start(address, lambda s: s.checksums(TIMEOUT_S)).result()
                outcome["log probs"] = log_probs(calls, address, canary)
            outcomes.append(outcome)
            if isinstance(transport, DistributedTransport):
                transport.close()
        if dist.get_rank() == 0:
            outcomes[0]["read"] = calls.start(address, lambda s: restart_from(s, server["other_model"])).result()
            calls.start(address, lambda s: restart_from(s, server["model"])).result()
        calls.close()
    return outcomes


async def greedy(server: SglangServer) -> list[int]:
    """What the server finds most likely, token after token."""
    sampling = {"temperature": 0.0, "max_new_tokens": NUM_GENERATED, "ignore_eos": True}
    body = json.dumps({"input_ids": PROMPT, "sampling_params": sampling}).encode()
    token_ids: list[int] = json.loads(await server.generate(body, TIMEOUT_S))["output_ids"]
    return token_ids


def most_likely(actor: TinyActor, response: list[int]) -> dict[str, list[Any]]:
    """The actor's most likely token at every place of a response, and by how much; empty but on the last stage."""
    token_ids = np.array([*PROMPT, *response], dtype=np.int32)
    batch = dataclasses.replace(random_batch([len(token_ids)]), token_ids=token_ids)
    for logits in sequence_logits(actor, batch):
        best = logits[len(PROMPT) - 1 : -1].topk(2, dim=-1)
        return {"actor's": best.indices[:, 0].tolist(), "gap": (best.values[:, 0] - best.values[:, 1]).tolist()}
    return {}


def log_probs(calls: ServerCalls, address: ServerAddress, canary: Canary) -> list[float]:
    prompt, response = canary.prompt_token_ids, canary.response_token_ids
    found = calls.start(address, lambda s: s.response_log_probs(prompt, response, TIMEOUT_S)).result()
    return [float(each) for each in found]


def test_every_transport_gives_the_server_the_actors_weights(sglang_server, tmp_path):
    kinds = ["distributed", "tensor", "disk"]
    told = {name: getattr(sglang_server, name) for name in ("url", "api_key", "model", "other_model")}
    outcomes, last_stage = run_distributed(push_kinds, 2, kinds, told, tmp_path, timeout_s=TIMEOUT_S)
    read = outcomes[0]["read"]
    for kind, outcome, actors in zip(kinds, outcomes, last_stage, strict=True):
        assert outcome["start"] != read, "the server must have other weights before"
        assert outcome["push"].failed == {}, kind
        assert outcome["pushed"] == read, f"{kind} gives other bits than the same weights from a folder"
        check = outcome["check"]
        assert check.failed == {} and check.max_difference <= 1e-4, kind
        moved = torch.tensor(outcome["log probs"]) - torch.tensor(outcome["log probs before"])
        assert moved.abs().mean() > 0.01, "the response is as likely as under other weights"
        assert outcome["greedy"] != outcome["greedy before"], "an update of all weights must change what is generated"
        places = [place for place, gap in enumerate(actors["gap"]) if gap > 1e-3]
        assert len(places) > NUM_GENERATED // 2
        assert [outcome["greedy"][place] for place in places] == [actors["actor's"][place] for place in places]
