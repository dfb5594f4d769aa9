"""The engine over a real server: what it sends is heeded, and what comes back is what the model says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
from megatron_fipo.rollout.sglang.client import ServerRefusedError, SglangServer, open_session
from megatron_fipo.rollout.sglang.engine import SglangEngine
from megatron_fipo.rollout.sglang.request_router import RequestRouter, open_router
from tests.misbehaving_proxy import FAULTS, misbehaving
from tests.sglang_servers import RunningServer, needs_sglang
from tests.stub_sglang import StubPool

pytestmark = [needs_sglang, pytest.mark.distributed]
VERSION = 5


@pytest.fixture(scope="module")
def model(sglang_server: RunningServer) -> Any:
    """The server's model as transformers computes it."""
    return AutoModelForCausalLM.from_pretrained(sglang_server.model, dtype=torch.float32).eval()


@asynccontextmanager
async def generating(
    server: RunningServer,
    vocabulary_size: int,
    url: str | None = None,
    router: RequestRouter | None = None,
    **sglang: Any,
) -> AsyncIterator[tuple[SglangEngine, SglangServer]]:
    pool = StubPool([], [url or server.url])
    pool.api_key = server.api_key
    config = RolloutConfig(engine="sglang", sglang=SglangConfig(**sglang))
    async with (
        open_session(server.api_key, 4) as session,
        SglangEngine(pool, config, vocabulary_size, router=router) as engine,
    ):
        client = SglangServer(server.url, session)
        await client.update_weight_version(VERSION)
        while not engine.servers:
            await engine.submit([])
            await asyncio.sleep(0.01)
        await engine.resume(VERSION, ())
        yield engine, client


def make_request(number: int, max_tokens: int = 8, stop: tuple[int, ...] = (), **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt_id=f"p{number // 4}",
        sample_index=number % 4,
        prompt_token_ids=np.array([number // 4 + 2, 7, 11, 13], dtype=np.int32),
        seed=3,
        sampling=SamplingParameters(
            **{"temperature": 1.0, "top_p": 1.0, "max_tokens": max_tokens, "stop_token_ids": stop, **sampling}
        ),
    )


async def take(engine: SglangEngine, *requests: GenerationRequest) -> dict[str, GenerationResult]:
    await engine.submit(requests)
    results = [result async for result in engine.stream()]
    assert len(results) == len({result.request_id for result in results}) == len(requests)
    return {result.request_id: result for result in results}


def scored(model: Any, request: GenerationRequest, result: GenerationResult, temperature: float) -> Any:
    """Log-probabilities of the whole distribution at a temperature, where the response was drawn."""
    ids = torch.from_numpy(np.concatenate([request.prompt_token_ids, result.token_ids])).long()
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(request.prompt_token_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def run(coroutine: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 300))


def test_log_probs_are_at_temperature_and_of_the_whole_distribution(sglang_server: RunningServer, model: Any) -> None:
    async def generate() -> None:
        async with generating(sglang_server, model.config.vocab_size) as (engine, client):
            kinds = [dict(temperature=1.0), dict(temperature=0.5, top_p=0.6), dict(temperature=0.5, greedy=True)]
            requests = [make_request(number, **kind) for number, kind in enumerate(kinds)]
            results = await take(engine, *requests)
            # Greedy decoding has no temperature of its own.
            for request, temperature in zip(requests, (1.0, 0.5, 1.0), strict=True):
                result = results[request.request_id]
                log_probs = scored(model, request, result, temperature)
                expected = log_probs.gather(1, torch.from_numpy(result.token_ids).long()[:, None])[:, 0]
                np.testing.assert_allclose(result.log_probs, expected, atol=1e-4)
                if request.sampling.greedy:
                    assert result.token_ids.tolist() == log_probs.argmax(-1).tolist()
            first = results[requests[0].request_id]
            again = await client.response_log_probs(requests[0].prompt_token_ids, first.token_ids)
            np.testing.assert_allclose(again, first.log_probs, atol=1e-4)
            assert {result.policy_version for result in results.values()} == {VERSION}

    run(generate())


def test_a_stop_token_ends_a_response_and_is_its_last(sglang_server: RunningServer, model: Any) -> None:
    async def generate() -> None:
        async with generating(sglang_server, model.config.vocab_size) as (engine, _):
            stops = tuple(range(0, model.config.vocab_size, 2))
            result = (await take(engine, make_request(0, max_tokens=200, stop=stops)))["p0#0"]
            assert result.finish_reason == "stop"
            assert result.token_ids[-1] in stops and not set(result.token_ids[:-1].tolist()) & set(stops)

    run(generate())


def test_the_longest_sequence_is_what_the_server_says(sglang_server: RunningServer, model: Any) -> None:
    async def generate() -> None:
        async with generating(sglang_server, model.config.vocab_size) as (engine, client):
            longest = (await client.info()).max_sequence_tokens - 4
            # One token that the server's own end-of-sequence may be; it ends the response early.
            result = (await take(engine, make_request(0, max_tokens=longest)))["p0#0"]
            assert result.finish_reason == "stop" or len(result.token_ids) == longest

    run(generate())


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_pause_leaves_each_token_the_version_that_gave_it(
    sglang_server: RunningServer, model: Any, mode: Any
) -> None:
    async def generate() -> None:
        async with generating(sglang_server, model.config.vocab_size) as (engine, client):
            requests = [make_request(number, max_tokens=240) for number in range(4)]
            await engine.submit(requests)
            await asyncio.sleep(0.2)
            await engine.pause(mode)
            await client.update_weight_version(VERSION + 1)
            await engine.resume(VERSION + 1, ())
            results = [result async for result in engine.stream()]
            assert {result.request_id for result in results} == {request.request_id for request in requests}
            if mode == "abort":
                assert "abort" in {result.finish_reason for result in results}
            else:
                assert any(result.policy_versions is not None for result in results)
            for result in results:
                versions = result.policy_versions
                assert versions is None or np.all(np.diff(versions) >= 0) and versions[-1] == VERSION + 1
                assert mode == "abort" or result.finish_reason != "abort"

    run(generate())


def test_a_router_before_the_server_changes_nothing(sglang_server: RunningServer, model: Any, tmp_path: Path) -> None:
    config = RolloutConfig(engine="sglang", sglang=SglangConfig(use_router=True))

    async def generate() -> None:
        async with (
            open_router(config, sglang_server.api_key, tmp_path) as router,
            generating(sglang_server, model.config.vocab_size, router=router) as (engine, client),
        ):
            assert router is not None
            while not router.servers:
                await take(engine, make_request(0))
            request = make_request(1, temperature=0.7)
            result = (await take(engine, request))[request.request_id]
            log_probs = scored(model, request, result, 0.7)
            expected = log_probs.gather(1, torch.from_numpy(result.token_ids).long()[:, None])[:, 0]
            np.testing.assert_allclose(result.log_probs, expected, atol=1e-4)
            requests = [make_request(number, max_tokens=240) for number in range(4)]
            await engine.submit(requests)
            await asyncio.sleep(0.2)
            assert router.flights
            await engine.abort([requests[0].request_id])
            await engine.pause("in_place")
            await client.update_weight_version(VERSION + 1)
            await engine.resume(VERSION + 1, ())
            results = {result.request_id: result async for result in engine.stream()}
            assert results.keys() == {request.request_id for request in requests}
            assert results["p0#0"].finish_reason in ("abort", "stop")
            assert any(result.policy_versions is not None for result in results.values())

    run(generate())


def test_a_second_session_of_weights_is_refused(sglang_server: RunningServer) -> None:
    async def ask() -> None:
        async with open_session(sglang_server.api_key, 4) as session:
            client = SglangServer(sglang_server.url, session)
            await client.begin_weight_update()
            try:
                with pytest.raises(ServerRefusedError, match="begin_weight_update at"):
                    await client.begin_weight_update()
            finally:
                await client.end_weight_update()
        async with open_session("another key", 4) as session:
            with pytest.raises(ServerRefusedError, match="rollout.sglang.api_key_file"):
                await SglangServer(sglang_server.url, session).info()

    run(ask())


def test_faults_on_the_way_to_a_real_server_cost_no_sample(sglang_server: RunningServer, model: Any) -> None:
    kinds = [kind for kind in FAULTS if kind not in ("never", "old_version")]

    async def generate() -> None:
        async with (
            misbehaving(sglang_server.url, 0, 0.4, 20, kinds) as proxy,
            generating(sglang_server, model.config.vocab_size, proxy.url, max_attempts=20) as (engine, _),
        ):
            requests = [make_request(number) for number in range(80)]
            results = await take(engine, *requests)
            assert sum(proxy.faults.values()) == 20
            for request in requests:
                result = results[request.request_id]
                expected = scored(model, request, result, 1.0).gather(
                    1, torch.from_numpy(result.token_ids).long()[:, None]
                )[:, 0]
                np.testing.assert_allclose(result.log_probs, expected, atol=1e-4)

    run(generate())
