"""Two hundred faults between engine and servers: every request has its one right answer."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import numpy as np
import pytest

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
from megatron_fipo.rollout.sglang import server_fleet
from megatron_fipo.rollout.sglang.engine import SglangEngine
from tests.misbehaving_proxy import FAULTS, misbehaving
from tests.stub_sglang import VOCABULARY, StubPool, StubSglang, expected_log_prob, expected_tokens, serving

NUM_SERVERS, NUM_FAULTS, VERSION = 3, 200, 2
# Each request that is never answered takes so long.
REQUEST_TIMEOUT_S = 5
SAMPLING = SamplingParameters(temperature=1.0, top_p=1.0, max_tokens=12, stop_token_ids=())


async def give_weights(engine: SglangEngine, stubs: list[StubSglang]) -> None:
    """Do as the trainer: servers without the version get it."""
    while True:
        if any(server.policy_version != VERSION for server in engine.servers):
            for stub in stubs:
                stub.weight_version = str(VERSION)
            await engine.resume(VERSION, ())
        await asyncio.sleep(0.02)


async def generate(seed: int) -> tuple[dict[str, GenerationResult], list[GenerationRequest], Counter[str]]:
    """Requests until so many faults have happened."""
    faults: Counter[str] = Counter()
    requests: list[GenerationRequest] = []
    results: dict[str, GenerationResult] = {}
    async with AsyncExitStack() as stack:
        stubs = await stack.enter_async_context(serving(NUM_SERVERS))
        proxies = [
            await stack.enter_async_context(
                misbehaving(stub.url, seed * 100 + place, 0.3, NUM_FAULTS // NUM_SERVERS + 1)
            )
            for place, stub in enumerate(stubs)
        ]
        pool = StubPool(stubs, [proxy.url for proxy in proxies])
        config = RolloutConfig(
            engine="sglang",
            group_size=4,
            max_requests_in_flight=64,
            sglang=SglangConfig(request_timeout_s=REQUEST_TIMEOUT_S, max_attempts=30),
        )
        engine = await stack.enter_async_context(SglangEngine(pool, config, VOCABULARY))
        trainer = asyncio.create_task(give_weights(engine, stubs))
        try:
            while any(proxy.num_left for proxy in proxies):
                first = len(requests)
                requests += [
                    GenerationRequest(
                        prompt_id=f"p{number // 4}",
                        sample_index=number % 4,
                        prompt_token_ids=np.array([number // 4 % VOCABULARY, number % 4, 5], dtype=np.int32),
                        seed=0,
                        sampling=SAMPLING,
                    )
                    for number in range(first, first + (100 if first else 600))
                ]
                await engine.submit(requests[first:])
                async for result in engine.stream():
                    assert result.request_id not in results
                    results[result.request_id] = result
        finally:
            trainer.cancel()
            await asyncio.gather(trainer, return_exceptions=True)
        faults = sum((proxy.faults for proxy in proxies), Counter())
    return results, requests, faults


@pytest.mark.parametrize("seed", [0])
def test_two_hundred_faults_cost_no_sample_and_count_none_twice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_fleet, "FIRST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(server_fleet, "LONGEST_BACK_OFF_S", 0.5)
    monkeypatch.setattr(server_fleet, "PROBE_AGAIN_S", 0.01)
    results, requests, faults = asyncio.run(asyncio.wait_for(generate(seed), 400))
    assert sum(faults.values()) >= NUM_FAULTS and faults.keys() == set(FAULTS)
    assert results.keys() == {request.request_id for request in requests}
    for request in requests:
        result = results[request.request_id]
        tokens = expected_tokens(request.prompt_token_ids.tolist(), SAMPLING.max_tokens)
        assert (result.token_ids.tolist(), result.policy_version, result.policy_versions) == (tokens, VERSION, None)
        assert result.log_probs.tolist() == [expected_log_prob(token, VERSION) for token in tokens]
