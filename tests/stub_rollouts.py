"""Requests to an engine over stub servers, and what their results must be."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
from megatron_fipo.rollout.sglang.engine import SglangEngine
from tests.stub_sglang import VOCABULARY, StubSglang, expected_log_prob, expected_tokens


def make_requests(num_groups: int, group_size: int = 2, max_tokens: int = 6, **more: Any) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt_id=f"p{group}",
            sample_index=index,
            prompt_token_ids=np.array([group % VOCABULARY, index, 3], dtype=np.int32),
            seed=0,
            sampling=SamplingParameters(temperature=1.0, top_p=1.0, max_tokens=max_tokens, stop_token_ids=()),
            **more,
        )
        for group in range(num_groups)
        for index in range(group_size)
    ]


def check(request: GenerationRequest, result: GenerationResult) -> None:
    """The tokens are the stub's for this very request, and their log-probabilities of the versions that are told."""
    begun = [] if request.begun_token_ids is None else request.begun_token_ids.tolist()
    most = request.sampling.max_tokens - len(begun)
    tokens = expected_tokens([*request.prompt_token_ids.tolist(), *begun], most)
    assert result.token_ids.tolist() == tokens[: len(result.token_ids)]
    assert result.finish_reason == "abort" or len(result.token_ids) == most
    versions = result.policy_versions
    versions = [result.policy_version] * len(tokens) if versions is None else versions.tolist()
    log_probs = [expected_log_prob(token, version) for token, version in zip(result.token_ids, versions, strict=False)]
    assert result.log_probs.tolist() == log_probs


async def known(engine: SglangEngine, count: int) -> None:
    while len(engine.servers) < count:
        await asyncio.sleep(0.005)


async def sync(engine: SglangEngine, stubs: Sequence[StubSglang], version: int, failed: Sequence[str] = ()) -> None:
    for stub in stubs:
        stub.set_version(version)
    await engine.resume(version, failed)


async def take(engine: SglangEngine, requests: Sequence[GenerationRequest]) -> dict[str, GenerationResult]:
    """All results, none twice, each what its request asked for."""
    results: dict[str, GenerationResult] = {}
    async for result in engine.stream():
        assert result.request_id not in results
        results[result.request_id] = result
    asked = {request.request_id: request for request in requests}
    assert results.keys() == asked.keys()
    for name, result in results.items():
        check(asked[name], result)
    return results
