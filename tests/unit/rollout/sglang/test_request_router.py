"""The real sglang-router before stub servers: each request has one result, and what controls servers goes past it."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.engine import SamplingParameters
from megatron_fipo.rollout.sglang import engine as engine_module
from megatron_fipo.rollout.sglang import request_router, server_fleet
from megatron_fipo.rollout.sglang.engine import SglangEngine
from megatron_fipo.rollout.sglang.generate_responses import request_body
from megatron_fipo.rollout.sglang.request_router import RequestRouter, check_router, open_router
from megatron_fipo.runtime.errors import RunError
from tests.misbehaving_proxy import FAULTS, misbehaving
from tests.process_groups import members, wait_until_empty
from tests.stub_rollouts import check, known, make_requests, sync, take
from tests.stub_sglang import VOCABULARY, StubPool, StubSglang, serving

KEY = "the key of the tests"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_fleet, "FIRST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(server_fleet, "PROBE_AGAIN_S", 0.01)
    monkeypatch.setattr(engine_module, "ABORT_INTERVAL_S", 0.05)


def run(coroutine: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def routed_config(**sglang: Any) -> RolloutConfig:
    return RolloutConfig(engine="sglang", group_size=2, sglang=SglangConfig(use_router=True, **sglang))


@asynccontextmanager
async def routed(
    folder: Path, may_restart: bool = True, **sglang: Any
) -> AsyncIterator[tuple[SglangEngine, RequestRouter, list[StubSglang], StubPool]]:
    """An engine whose requests go through a router to two servers of version 0."""
    async with AsyncExitStack() as stack:
        stubs = await stack.enter_async_context(serving(2))
        pool = StubPool(stubs)
        pool.api_key, pool.may_restart = KEY, may_restart
        pool.lives = [replace(life, may_restart=may_restart) for life in pool.lives]
        for stub in stubs:
            stub.api_key = KEY
        config = routed_config(**sglang)
        router = await stack.enter_async_context(open_router(config, KEY, folder))
        assert router is not None
        engine = await stack.enter_async_context(SglangEngine(pool, config, VOCABULARY, router=router))
        await known(engine, 2)
        await sync(engine, stubs, 0)
        await settled(engine, router, {"server0.life0", "server1.life0"})
        for stub in stubs:
            stub.requests.clear()
        yield engine, router, stubs, pool


async def settled(engine: SglangEngine, router: RequestRouter, names: set[str]) -> None:
    """Return once requests go through the router to these servers."""
    while {server.life.name for server in router.servers} != names:
        requests = make_requests(1)
        await engine.submit(requests)
        await take(engine, requests)


async def wait_for_running(stubs: Sequence[StubSglang], count: int) -> None:
    while sum(len(stub.running) for stub in stubs) < count:
        await asyncio.sleep(0.005)


def hold(stubs: Sequence[StubSglang]) -> None:
    for stub in stubs:
        stub.is_held = True


def was_routed(payload: dict[str, Any]) -> bool:
    """The router writes requests anew, with a field that the engine does not know."""
    return "model" in payload


def router_process() -> psutil.Process:
    (found,) = [
        child
        for child in psutil.Process().children(recursive=True)
        if "megatron_fipo.rollout.sglang.router_program" in child.cmdline()[:4]
    ]
    return found


def test_requests_go_through_the_router_and_a_group_to_one_server(tmp_path: Path) -> None:
    async def generate() -> None:
        async with routed(tmp_path) as (engine, _, stubs, pool):
            hold(stubs)
            requests = make_requests(20)
            await engine.submit(requests)
            await wait_for_running(stubs, 40)
            for stub in stubs:
                stub.release()
            await take(engine, requests)
            sent = [payload for stub in stubs for payload in stub.requests]
            assert len(sent) == 40 and all(map(was_routed, sent))
            served = [{payload["input_ids"][0] for payload in stub.requests} for stub in stubs]
            assert not served[0] & served[1] and min(map(len, served)) >= 8
            assert not pool.restarts
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(generate())
    assert not [path for path in tmp_path.iterdir() if path.name != "router.log"]


def test_all_that_is_asked_reaches_the_server(tmp_path: Path) -> None:
    """The router knows the fields of a request by itself, and leaves out those that it does not know."""

    async def generate() -> None:
        async with routed(tmp_path) as (engine, _, stubs, _):
            begun = np.array([7, 8], dtype=np.int32)
            sampling = SamplingParameters(temperature=0.7, top_p=0.9, max_tokens=6, stop_token_ids=(400, 401))
            request = replace(make_requests(1)[0], sampling=sampling, begun_token_ids=begun)
            await engine.submit([request])
            await take(engine, [request])
            (payload,) = [payload for stub in stubs for payload in stub.requests]
            asked = orjson.loads(request_body(request, payload["rid"], 0, with_seed=False))
            sampled = asked.pop("sampling_params")
            assert was_routed(payload) and payload.items() >= asked.items()
            assert payload["sampling_params"].items() >= sampled.items()

    run(generate())


def test_an_abort_is_said_to_the_servers(tmp_path: Path) -> None:
    async def generate() -> None:
        async with routed(tmp_path) as (engine, _, stubs, _):
            hold(stubs)
            requests = make_requests(2)
            await engine.submit(requests)
            await wait_for_running(stubs, 4)
            await engine.abort([requests[0].request_id])
            first = await anext(aiter(engine.stream()))
            assert (first.request_id, first.finish_reason, len(first.token_ids)) == ("p0#0", "abort", 3)
            check(requests[0], first)
            assert all("abort_request" in stub.calls for stub in stubs)
            for stub in stubs:
                stub.release()
            await take(engine, requests[1:])

    run(generate())


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_new_weights_amid_requests(tmp_path: Path, mode: Any) -> None:
    async def generate() -> None:
        async with routed(tmp_path) as (engine, router, stubs, pool):
            hold(stubs)
            requests = make_requests(2)
            await engine.submit(requests)
            await wait_for_running(stubs, 4)
            await engine.pause(mode)
            if mode == "abort":
                ended = {(await anext(aiter(engine.stream()))).finish_reason for _ in range(4)}
                assert ended == {"abort"}
            await sync(engine, stubs, 1)
            for stub in stubs:
                stub.release()
            if mode != "abort":
                results = await take(engine, requests)
                assert all(result.policy_versions.tolist() == [0, 0, 0, 1, 1, 1] for result in results.values())
            await engine.submit(requests)
            results = await take(engine, requests)
            assert {result.policy_version for result in results.values()} == {1}
            assert all(was_routed(payload) for stub in stubs for payload in stub.requests)

    run(generate())


def test_answers_of_weights_that_fail_their_verification_are_thrown_away(tmp_path: Path) -> None:
    async def generate() -> None:
        async with routed(tmp_path) as (engine, _, stubs, pool):
            hold(stubs)
            requests = make_requests(6)
            await engine.submit(requests)
            await wait_for_running(stubs, 12)
            await engine.pause("retract")
            for stub in stubs:
                stub.set_version(1)
            unverified = [payload["input_ids"] for payload in stubs[0].requests]
            results = asyncio.ensure_future(take(engine, requests))
            # The server goes on so that its weights can be verified, and answers before they turn out wrong.
            stubs[0].release()
            done, _ = await asyncio.wait([results], timeout=0.2)
            assert not done and not stubs[0].running
            await engine.resume(1, ["server0.life0"])
            stubs[1].release()
            await results
            served = [payload["input_ids"] for payload in stubs[1].requests]
            assert unverified and all(ids in served for ids in unverified)

    run(generate())


def test_a_server_that_ends_amid_requests_costs_none(tmp_path: Path) -> None:
    async def generate() -> None:
        async with routed(tmp_path) as (engine, router, stubs, pool):
            hold(stubs)
            requests = make_requests(6)
            await engine.submit(requests)
            await wait_for_running(stubs, 12)
            kept = len(stubs[1].running)
            await pool.restart("server0.life0", "it was killed")
            stubs[0].cut_connections()
            while len(stubs[1].requests) < 12:
                await asyncio.sleep(0.005)
            stubs[1].release()
            await take(engine, requests)
            # What the other one worked on went on, and what was lost went there straight away.
            routed_there = [was_routed(payload) for payload in stubs[1].requests]
            assert routed_there == [True] * kept + [False] * (12 - kept) and 0 < kept < 12
            await settled(engine, router, {"server1.life0"})
            await known(engine, 2)
            await sync(engine, stubs, 1)
            await settled(engine, router, {"server0.life1", "server1.life0"})

    run(generate())


def test_requests_of_a_hung_server_that_nobody_restarts_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_fleet, "PROBE_INTERVAL_S", 0.05)
    monkeypatch.setattr(server_fleet, "PROBE_TIMEOUT_S", 0.5)

    async def generate() -> None:
        async with routed(tmp_path, may_restart=False) as (engine, _, stubs, pool):
            hold(stubs[:1])
            requests = make_requests(6)
            await engine.submit(requests)
            await wait_for_running(stubs[:1], 1)
            stubs[0].is_silent = True
            await take(engine, requests)
            assert [name for name, _ in pool.restarts] == ["server0.life0"]

    run(generate())


def test_a_server_that_lost_its_weights_is_found(tmp_path: Path) -> None:
    async def generate() -> None:
        async with routed(tmp_path, max_attempts=20) as (engine, router, stubs, pool):
            stubs[0].weight_version = "default"
            requests = make_requests(20)
            await engine.submit(requests)
            results = await take(engine, requests)
            assert {result.policy_version for result in results.values()} == {0}
            assert [server.policy_version for server in engine.servers] == [-1, 0] and not pool.restarts
            await settled(engine, router, {"server1.life0"})

    run(generate())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_without_the_router_requests_go_straight_to_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    monkeypatch.setattr(request_router, "PROBE_INTERVAL_S", 0.05)
    monkeypatch.setattr(request_router, "PROBE_TIMEOUT_S", 0.5)

    async def generate() -> None:
        async with routed(tmp_path) as (engine, _, stubs, pool):
            hold(stubs)
            requests = make_requests(4)
            await engine.submit(requests)
            await wait_for_running(stubs, 8)
            router_process().send_signal(sent)
            while sum(len(stub.requests) for stub in stubs) < 16:
                await asyncio.sleep(0.005)
            for stub in stubs:
                stub.release()
            await take(engine, requests)
            assert not pool.restarts
            assert [was_routed(payload) for stub in stubs for payload in stub.requests].count(False) == 8

    run(generate())


def test_faults_between_router_and_servers_cost_no_sample(tmp_path: Path) -> None:
    kinds = [kind for kind in FAULTS if kind not in ("never", "old_version")]

    async def generate() -> None:
        async with AsyncExitStack() as stack:
            stubs = await stack.enter_async_context(serving(2))
            proxies = [await stack.enter_async_context(misbehaving(stub.url, 7, 0.0, 40, kinds)) for stub in stubs]
            pool = StubPool(stubs, [proxy.url for proxy in proxies])
            router = await stack.enter_async_context(open_router(routed_config(), None, tmp_path))
            assert router is not None
            config = routed_config(max_attempts=30)
            engine = await stack.enter_async_context(SglangEngine(pool, config, VOCABULARY, router=router))
            await known(engine, 2)
            await sync(engine, stubs, 0)
            await settled(engine, router, {"server0.life0", "server1.life0"})
            for proxy in proxies:
                proxy.rate = 0.2
            rounds = 0
            while any(proxy.num_left for proxy in proxies):
                requests = make_requests(60)
                await engine.submit(requests)
                await take(engine, requests)
                rounds += 1
            assert rounds > 1 and any(map(was_routed, stubs[1].requests[len(stubs[1].requests) // 2 :]))
            assert sum(sum(proxy.faults.values()) for proxy in proxies) == 80

    run(generate())


_OWNER = """
import asyncio, sys
from pathlib import Path
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.sglang.request_router import open_router

async def main():
    config = RolloutConfig(engine="sglang", sglang=SglangConfig(use_router=True))
    async with open_router(config, "a key", Path(sys.argv[1])):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_the_router_ends_with_its_owner_however_that_ends(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    with owner, owner.stdout:
        assert owner.stdout.readline() == b"ready\n"
        group = os.getpgid(router_process().pid)
        assert group != os.getpgid(owner.pid) and members(group)
        owner.kill()
    wait_until_empty(group)


def test_a_router_that_does_not_start_is_told_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start() -> None:
        async with open_router(routed_config(), None, tmp_path):
            pass

    monkeypatch.setattr(request_router, "START_TIMEOUT_S", 0.0)
    before = set(psutil.Process().children())
    with pytest.raises(RunError, match="rollout.sglang.use_router: the router did not answer"):
        run(start())
    started = set(psutil.Process().children()) - before
    assert not [child for child in started if child.status() != psutil.STATUS_ZOMBIE]


def test_a_router_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_router(SglangConfig(use_router=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_router(SglangConfig())
    with pytest.raises(ConfigError, match="pip install sglang-router"):
        check_router(SglangConfig(use_router=True))
