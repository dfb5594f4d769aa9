"""What SGLang does on a CUDA device alone: memory given back, seeds heeded, FP8 weights."""

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParameters, ServerAddress
from megatron_fipo.rollout.sglang.client import SglangServer, open_session
from megatron_fipo.rollout.sglang.generate_responses import read_response, request_body
from megatron_fipo.weight_sync.canary import Canary, canary_token_ids
from megatron_fipo.weight_sync.server_calls import ServerCalls
from megatron_fipo.weight_sync.tensor import TensorTransport
from megatron_fipo.weight_sync.verification import WeightVerification
from tests.sglang_servers import RunningServer, needs_sglang, running_server
from tests.tiny_actors import tiny_actor
from tests.tiny_models import EOS_TOKEN_ID

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_sglang,
]

TIMEOUT_S = 300.0
PROMPT, RESPONSE = [72, 101, 108, 108, 111], [32, 119, 111, 114, 108, 100]
# The default backends ask for larger heads than tiny models have.
SMALL = {"attention_backend": "triton", "disable_cuda_graph": True}

type Call[T] = Callable[[SglangServer], Awaitable[T]]


def ask[T](server: RunningServer, call: Call[T]) -> T:
    async def with_session() -> T:
        async with open_session(server.api_key, 64) as session:
            return await call(SglangServer(server.url, session))

    return server.run(with_session())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that gives memory back and heeds seeds; a million tokens of KV cache are memory that can be seen."""
    arguments = {"enable_deterministic_inference": True, "max_total_tokens": 1 << 20}
    if importlib.util.find_spec("torch_memory_saver") is not None:
        arguments["enable_memory_saver"] = True
    with running_server(tmp_path_factory.mktemp("server"), dtype="bfloat16", **SMALL, **arguments) as running:
        yield running


def free_mib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**20


@pytest.mark.skipif(
    importlib.util.find_spec("torch_memory_saver") is None, reason="torch_memory_saver, which SGLang needs, is missing"
)
def test_memory_is_given_back_and_taken_again(server: RunningServer) -> None:
    before = ask(server, lambda s: s.response_log_probs(PROMPT, RESPONSE, TIMEOUT_S))
    free = free_mib()
    ask(server, lambda s: s.pause_generation("abort"))
    ask(server, lambda s: s.release_memory_occupation(["kv_cache"]))
    without_cache = free_mib()
    ask(server, lambda s: s.release_memory_occupation(["weights"]))
    assert without_cache - free > 64
    assert free_mib() >= without_cache
    ask(server, lambda s: s.resume_memory_occupation(["weights"]))
    ask(server, lambda s: s.update_weights_from_disk(str(server.model), TIMEOUT_S))
    ask(server, lambda s: s.resume_memory_occupation(["kv_cache"]))
    ask(server, lambda s: s.continue_generation())
    ask(server, lambda s: s.flush_cache())
    after = ask(server, lambda s: s.response_log_probs(PROMPT, RESPONSE, TIMEOUT_S))
    np.testing.assert_allclose(after, before, atol=1e-3)


def request(number: int, seed: int) -> GenerationRequest:
    return GenerationRequest(
        prompt_id=f"p{number}",
        sample_index=0,
        prompt_token_ids=np.array([number + 2, *PROMPT], dtype=np.int32),
        seed=seed,
        sampling=SamplingParameters(temperature=1.0, top_p=1.0, max_tokens=64, stop_token_ids=()),
    )


def test_a_seed_gives_the_same_tokens_whatever_else_runs(server: RunningServer) -> None:
    async def generate(client: SglangServer, one: GenerationRequest, rid: str) -> list[int]:
        body = await client.generate(request_body(one, rid, with_seed=True), TIMEOUT_S)
        return read_response(body, one, rid, 1 << 20).token_ids.tolist()

    async def together(client: SglangServer) -> list[list[int]]:
        return await asyncio.gather(
            *(generate(client, request(number, 7), f"together {number}") for number in range(8))
        )

    async def alone(client: SglangServer) -> list[int]:
        return await generate(client, request(3, 7), "alone")

    async def other_seed(client: SglangServer) -> list[int]:
        return await generate(client, request(3, 8), "other seed")

    assert ask(server, lambda s: s.info()).is_deterministic
    first = ask(server, alone)
    assert ask(server, together)[3] == first
    assert ask(server, other_seed) != first


def test_a_server_of_fp8_weights_takes_in_the_actors(tmp_path: Path) -> None:
    """By handles to memory of the same GPU, on which NCCL takes one rank alone."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/world", rank=0, world_size=1)
    try:
        with running_server(tmp_path, dtype="bfloat16", quantization="fp8", **SMALL) as running:
            with tiny_actor(running.other_model, {}, dtype="bfloat16") as actor:
                calls = ServerCalls(running.api_key)
                # FP8 has three bits of mantissa; a wrong scale or a missing tensor is off by nats.
                config = WeightSyncConfig(canary_tolerance=0.3)
                token_ids = canary_token_ids(actor.bridge.vocab_size, {EOS_TOKEN_ID}, longest=64)
                canary = Canary(token_ids, actor.forward, packing_rules(actor.parallelism), actor.context)
                verification = WeightVerification(canary, config, "bfloat16", calls)
                address = ServerAddress(name="fp8", url=running.url, tensor_parallel_size=1, policy_version=-1)
                verification.expect()
                pushed = TensorTransport(actor.bridge, unwrap(actor.chunks), config, calls).push(1, [address])
                checked = verification.check(1, [address])
                calls.close()
        assert pushed.failed == {} and checked.failed == {}
        assert 0 < checked.mean_difference < 0.3
    finally:
        dist.destroy_process_group()
