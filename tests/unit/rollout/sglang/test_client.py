import asyncio
import json
import resource
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_fipo.rollout.sglang.client import (
    ServerError,
    ServerNonsenseError,
    ServerRefusedError,
    ServerSilentError,
    ServerUnreachableError,
    SglangServer,
    open_session,
    policy_version_of,
)
from megatron_fipo.runtime.errors import RunError

SILENCE = object()
# A body of status 200, a status and a body, SILENCE, or what answers.
Answer = Any


class Calls:
    """Answers each path as told, and keeps what it was asked."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers, self.seen, self.closing = answers, [], asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.method, request.path, json.loads(body) if body else None, request.headers))
        answer = self.answers.get(request.path.removeprefix("/"))
        if answer is SILENCE:
            await self.closing.wait()
        if callable(answer):
            return await answer(request)
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        if answer is None:
            status, content = 404, {"detail": "Not Found"}
        return web.Response(status=status, body=content if isinstance(content, bytes) else json.dumps(content).encode())


@asynccontextmanager
async def serving(api_key: str | None = None, **answers: Answer) -> AsyncIterator[tuple[SglangServer, Calls]]:
    calls = Calls(answers)
    runner = web.ServerRunner(web.Server(calls.handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with open_session(api_key, 4) as session:
            yield SglangServer(f"http://127.0.0.1:{port}/", session), calls
    finally:
        calls.closing.set()
        await runner.cleanup()


DONE = {"success": True, "message": "Success."}


def run(coroutine: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.mark.parametrize(("text", "version"), [("7", 7), ("0", 0), ("default", -1), ("-3", -1), ("٣", -1), ("", -1)])
def test_a_version_of_weights_is_a_number_of_ours_or_none(text: str, version: int) -> None:
    assert policy_version_of(text) == version


def test_info_tells_the_version_of_the_front_and_of_every_worker() -> None:
    told = {
        "internal_states": [{"weight_version": "4"}, {"weight_version": "3"}],
        "tp_size": 2,
        "base_gpu_id": 4,
        "max_req_input_len": 250,
        "enable_deterministic_inference": False,
        "enable_return_routed_experts": True,
        "version": "0.5.21",
    }

    async def ask() -> None:
        async with serving(model_info={"weight_version": "4"}, server_info=told) as (server, _):
            info = await server.info()
        assert info.policy_versions == (4, 4, 3)
        assert (info.tensor_parallel_size, info.first_gpu, info.max_sequence_tokens) == (2, 4, 254)
        assert info.returns_routed_experts and not info.is_deterministic

    run(ask())


def test_the_key_and_the_fields_of_a_command_reach_the_server() -> None:
    async def ask() -> None:
        async with serving("secret", update_weights_from_distributed=DONE) as (server, calls):
            tensors = {"a": ("bfloat16", (2, 3)), "b": ("float32", (4,))}
            await server.update_weights_from_distributed(tensors, "group", 5, "flattened_bucket")
        method, path, body, headers = calls.seen[0]
        assert (method, path, headers["Authorization"]) == (
            "POST",
            "/update_weights_from_distributed",
            "Bearer secret",
        )
        assert body == {
            "names": ["a", "b"],
            "dtypes": ["bfloat16", "float32"],
            "shapes": [[2, 3], [4]],
            "group_name": "group",
            "flush_cache": False,
            "load_format": "flattened_bucket",
        }

    run(ask())


def test_log_probs_of_a_response_are_those_after_the_prompts_last_token() -> None:
    entries = [[None, 1, None], [-9.0, 2, None], [-8.0, 3, None], [-1.5, 4, None], [-0.25, 5, None]]

    async def ask() -> None:
        answer = {"output_ids": [], "meta_info": {"input_token_logprobs": entries}}
        async with serving(generate=answer) as (server, calls):
            log_probs = await server.response_log_probs(np.array([1, 2, 3]), np.array([4, 5]))
            np.testing.assert_array_equal(log_probs, np.float32([-1.5, -0.25]))
            assert calls.seen[0][2]["logprob_start_len"] == 0
            assert calls.seen[0][2]["input_ids"] == [1, 2, 3, 4, 5]
            with pytest.raises(ServerNonsenseError, match="5 tokens, not of those that were sent"):
                await server.response_log_probs([1, 2, 3], [4, 6])

    run(ask())


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def stop_half_way(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"success"')
    return await hang_up(request)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ((500, b"Internal Server Error"), ServerRefusedError, "status 500: Internal"),
        ((401, b"Unauthorized"), ServerRefusedError, "rollout.sglang.api_key_file"),
        ({"success": False, "message": "no session"}, ServerRefusedError, "no session"),
        (b'{"success":', ServerNonsenseError, "is not JSON"),
        (hang_up, ServerUnreachableError, "Disconnected"),
        (stop_half_way, ServerUnreachableError, "PayloadError"),
        (SILENCE, ServerSilentError, "no answer in 0.1 s"),
    ],
)
def test_what_goes_wrong_is_told_with_server_call_and_way_out(answer: Answer, kind: type, text: str) -> None:
    async def ask() -> None:
        async with serving(begin_weight_update=answer) as (server, _):
            with pytest.raises(kind) as told:
                await server.begin_weight_update(timeout_s=0.1 if answer is SILENCE else 60)
            assert str(told.value).startswith(f"begin_weight_update at {server.url}: ")
            assert text in str(told.value)

    run(ask())


def test_a_server_that_is_not_there_is_not_ready_and_says_so() -> None:
    async def ask() -> None:
        async with serving() as (server, _):
            gone = server
        async with open_session(None, 4) as session:
            again = SglangServer(gone.url, session)
            assert not await again.is_ready()
            with pytest.raises(ServerUnreachableError, match="Cannot connect"):
                await again.check_health()

    run(ask())


def test_a_router_does_not_know_control_calls() -> None:
    async def ask() -> None:
        async with serving() as (server, _):
            with pytest.raises(ServerRefusedError, match="not to a router") as told:
                await server.pause_generation("abort")
            assert told.value.status == 404

    run(ask())


def test_the_body_of_an_answer_waits_for_its_reader_beyond_the_deadline() -> None:
    async def ask() -> None:
        may_read = asyncio.Event()
        async with serving(generate=b"x" * 300) as (server, _):
            asking = asyncio.create_task(server.generate(b"{}", 1, may_read.wait))
            done_early, _ = await asyncio.wait([asking], timeout=1.5)
            assert not done_early
            may_read.set()
            assert await asking == b"x" * 300

    run(ask())


def test_a_session_raises_the_limit_on_open_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))

    async def ask() -> int:
        async with open_session(None, 100):
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    try:
        assert run(ask()) == 356
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_on_open_files_that_is_too_low_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))

    async def ask() -> None:
        async with open_session(None, 4096):
            pass

    with pytest.raises(RunError, match=r"need 4352 open files.* have 4096.*\(`ulimit -n 4352`\).*in_flight"):
        run(ask())


def test_errors_are_of_one_family() -> None:
    for kind in (ServerUnreachableError, ServerSilentError, ServerRefusedError, ServerNonsenseError):
        assert issubclass(kind, ServerError)
