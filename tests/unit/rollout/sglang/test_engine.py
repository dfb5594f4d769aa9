import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, ServedEngine
from megatron_fipo.rollout.sglang import engine as engine_module
from megatron_fipo.rollout.sglang import server_fleet
from megatron_fipo.rollout.sglang.engine import SglangEngine
from megatron_fipo.rollout.sglang.generate_responses import RoutingShape
from megatron_fipo.runtime.errors import RunError
from tests.stub_rollouts import check, known, make_requests, sync, take
from tests.stub_sglang import MAX_REQUEST_INPUT, VOCABULARY, StubPool, StubSglang, serving


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_fleet, "FIRST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(server_fleet, "PROBE_AGAIN_S", 0.01)
    monkeypatch.setattr(engine_module, "ABORT_INTERVAL_S", 0.05)


@asynccontextmanager
async def running(
    num_servers: int, version: int | None = 0, pool: StubPool | None = None, **config: Any
) -> AsyncIterator[tuple[SglangEngine, list[StubSglang], StubPool]]:
    """An engine over stubs that have weights of a version."""
    sglang = {key: config.pop(key) for key in ("request_timeout_s", "max_attempts", "start_timeout_s") if key in config}
    async with serving(num_servers) as stubs:
        pool = StubPool(stubs)
        settings = RolloutConfig(engine="sglang", group_size=2, sglang=SglangConfig(**sglang), **config)
        async with SglangEngine(pool, settings, VOCABULARY) as engine:
            await known(engine, num_servers)
            if version is not None:
                await sync(engine, stubs, version)
            yield engine, stubs, pool


def run(coroutine: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def test_every_request_has_one_result_and_a_group_one_server() -> None:
    async def generate() -> None:
        async with running(3) as (engine, stubs, pool):
            assert isinstance(engine, ServedEngine)
            requests = make_requests(30)
            await engine.submit(requests)
            results = await take(engine, requests)
            assert all(result.policy_version == 0 for result in results.values())
            served = [{(r["input_ids"][0], r["input_ids"][1]) for r in stub.requests} for stub in stubs]
            for one in served:
                assert {group for group, _ in one} and all((group, 1 - index) in one for group, index in one)
            assert max(map(len, served)) <= 2 * min(map(len, served))
            assert not pool.restarts

    run(generate())


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    async def generate() -> None:
        async with running(1, max_requests_in_flight=5) as (engine, stubs, _):
            stubs[0].is_held = True
            requests = make_requests(10)
            await engine.submit(requests)
            await stubs[0].wait_for_running(5)
            await asyncio.sleep(0.05)
            assert len(stubs[0].running) == 5
            stubs[0].release()
            await take(engine, requests)

    run(generate())


def test_answers_wait_in_the_network_while_nobody_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_RESULTS_WAITING", 4)
    read: list[str] = []
    real = engine_module.read_response

    def count(body: bytes, request: GenerationRequest, *more: Any) -> GenerationResult:
        read.append(request.request_id)
        return real(body, request, *more)

    monkeypatch.setattr(engine_module, "read_response", count)

    async def generate() -> None:
        async with running(1) as (engine, stubs, pool):
            requests = make_requests(10)
            await engine.submit(requests)
            while len(stubs[0].requests) < 20 or len(read) < 4:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert len(read) == 4
            await take(engine, requests)
            assert len(read) == 20 and not pool.restarts

    run(generate())


@pytest.mark.parametrize("prompt", [[1, VOCABULARY], [-1, 1], []])
def test_ids_that_would_end_a_server_are_never_sent(prompt: list[int]) -> None:
    async def generate() -> None:
        async with running(1) as (engine, stubs, _):
            request = make_requests(1)[0]
            object.__setattr__(request, "prompt_token_ids", np.array(prompt, dtype=np.int32))
            with pytest.raises(RunError, match="request p0#0"):
                await engine.submit([request])
            assert not stubs[0].requests

    run(generate())


def test_what_a_server_would_cut_is_refused_with_the_way_out() -> None:
    async def generate() -> None:
        async with running(1) as (engine, stubs, _):
            fits = make_requests(1, max_tokens=MAX_REQUEST_INPUT + 4 - 3)
            await engine.submit(fits)
            await take(engine, fits)
            await engine.submit(make_requests(1, max_tokens=MAX_REQUEST_INPUT + 4 - 2))
            with pytest.raises(RunError, match="rollout.max_response_tokens"):
                await take(engine, [])

    run(generate())


def test_a_name_in_flight_is_not_taken_twice() -> None:
    async def generate() -> None:
        async with running(1) as (engine, stubs, _):
            stubs[0].is_held = True
            requests = make_requests(1)
            await engine.submit(requests)
            with pytest.raises(ValueError, match="in flight already"):
                await engine.submit(requests)
            stubs[0].release()
            await take(engine, requests)
            await engine.submit(requests)
            await take(engine, requests)

    run(generate())


def test_an_aborted_request_has_what_it_got_and_one_that_waits_nothing() -> None:
    async def generate() -> None:
        async with running(1, max_requests_in_flight=2) as (engine, stubs, _):
            stubs[0].is_held = True
            requests = make_requests(2)
            await engine.submit(requests)
            await stubs[0].wait_for_running(2)
            await engine.abort([requests[0].request_id, requests[3].request_id, "unknown"])
            results = {}
            async for result in engine.stream():
                results[result.request_id] = result
                if len(results) == 2:
                    stubs[0].release()
            assert {name: (len(r.token_ids), r.finish_reason) for name, r in results.items()} == {
                "p0#0": (3, "abort"),
                "p1#1": (0, "abort"),
                "p0#1": (6, "length"),
                "p1#0": (6, "length"),
            }
            for request in requests:
                check(request, results[request.request_id])

    run(generate())


def test_a_pause_with_abort_ends_what_runs_and_keeps_what_waits() -> None:
    async def generate() -> None:
        async with running(1, max_requests_in_flight=2) as (engine, stubs, _):
            stubs[0].is_held = True
            requests = make_requests(2)
            await engine.submit(requests)
            await stubs[0].wait_for_running(2)
            await engine.pause("abort")
            ended = [await anext(aiter(engine.stream())) for _ in range(2)]
            assert {result.finish_reason for result in ended} == {"abort"}
            assert len(stubs[0].requests) == 2
            stubs[0].is_held = False
            await sync(engine, stubs, 1)
            rest = {result.request_id: result async for result in engine.stream()}
            assert rest.keys() == {"p1#0", "p1#1"}
            assert all(result.policy_version == 1 for result in rest.values())

    run(generate())


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_in_place_lets_requests_go_on_with_newer_weights(mode: Any) -> None:
    async def generate() -> None:
        async with running(1) as (engine, stubs, _):
            stubs[0].is_held = True
            requests = make_requests(1)
            await engine.submit(requests)
            await stubs[0].wait_for_running(2)
            await engine.pause(mode)
            await sync(engine, stubs, 1)
            stubs[0].release()
            results = await take(engine, requests)
            for result in results.values():
                assert result.policy_version == 0
                assert result.policy_versions.tolist() == [0, 0, 0, 1, 1, 1]

    run(generate())


def test_what_a_server_finishes_before_its_weights_are_verified_waits_for_that() -> None:
    async def check() -> None:
        async with running(1) as (engine, stubs, _):
            stubs[0].is_held = True
            requests = make_requests(1)
            await engine.submit(requests)
            await stubs[0].wait_for_running(2)
            await engine.pause("retract")
            stubs[0].set_version(1)
            stubs[0].release()
            results = asyncio.ensure_future(take(engine, requests))
            # The answer is there before the engine hears that the weights are right.
            done, _ = await asyncio.wait([results], timeout=0.2)
            assert not done
            await engine.resume(1, ())
            for result in (await results).values():
                assert result.policy_versions.tolist() == [0, 0, 0, 1, 1, 1]
            assert len(stubs[0].requests) == 2

    run(check())


def test_nothing_is_sent_to_a_server_without_the_version_and_it_may_get_it_later() -> None:
    async def generate() -> None:
        async with running(2, version=None) as (engine, stubs, pool):
            assert [server.policy_version for server in engine.servers] == [-1, -1]
            stubs[0].set_version(4)
            stubs[1].set_version(3)
            await engine.resume(4, ())
            assert [server.policy_version for server in engine.servers] == [4, -1]
            requests = make_requests(6)
            await engine.submit(requests)
            await take(engine, requests)
            assert len(stubs[0].requests) == 12 and not stubs[1].requests and not pool.restarts
            stubs[1].set_version(4)
            await engine.resume(4, ())
            await engine.submit(requests)
            await take(engine, requests)
            assert stubs[1].requests

    run(generate())


def test_a_server_that_failed_to_take_weights_in_is_restarted_and_waits_for_them() -> None:
    async def generate() -> None:
        async with running(2) as (engine, stubs, pool):
            await engine.pause("abort")
            await sync(engine, stubs, 1, failed=["server1.life0"])
            await known(engine, 2)
            assert [name for name, _ in pool.restarts] == ["server1.life0"]
            assert {server.name: server.policy_version for server in engine.servers} == {
                "server0.life0": 1,
                "server1.life1": -1,
            }
            requests = make_requests(4)
            await engine.submit(requests)
            await take(engine, requests)
            assert not stubs[1].requests

    run(generate())


def test_a_late_request_alone_is_tried_again_at_a_sound_server() -> None:
    async def generate() -> None:
        async with running(1, request_timeout_s=1) as (engine, stubs, pool):
            stubs[0].is_held = True
            late, *others = make_requests(4)
            await engine.submit([late])
            await stubs[0].wait_for_running(1)
            # What comes from now on is answered at once.
            stubs[0].is_held = False
            await engine.submit(others)
            await take(engine, [late, *others])
            sent = Counter(tuple(payload["input_ids"]) for payload in stubs[0].requests)
            assert sent.pop((0, 0, 3)) == 2 and set(sent.values()) == {1} and len(sent) == 7
            assert "abort_request" in stubs[0].calls
            assert [server.policy_version for server in engine.servers] == [0] and not pool.restarts

    run(generate())


def test_a_server_that_hangs_is_found_by_a_late_request_and_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_fleet, "PROBE_TIMEOUT_S", 0.5)

    async def generate() -> None:
        async with running(2, request_timeout_s=1) as (engine, stubs, pool):
            stubs[0].is_silent = True
            requests = make_requests(8)
            await engine.submit(requests)
            # The requests need not wait for that: they are tried elsewhere.
            await take(engine, requests)
            while not pool.restarts:
                await asyncio.sleep(0.005)
            assert {name for name, _ in pool.restarts} == {"server0.life0"}
            assert "health_generate" in pool.restarts[0][1]

    run(generate())


def test_a_server_that_shows_no_health_is_restarted_before_its_requests_time_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_fleet, "PROBE_INTERVAL_S", 0.05)
    monkeypatch.setattr(server_fleet, "PROBE_TIMEOUT_S", 0.1)

    async def generate() -> None:
        async with running(2) as (engine, stubs, pool):
            stubs[0].is_silent = True
            requests = make_requests(8)
            await engine.submit(requests)
            await take(engine, requests)
            assert {name for name, _ in pool.restarts} == {"server0.life0"}

    run(generate())


def test_requests_of_a_server_that_is_gone_move() -> None:
    async def generate() -> None:
        async with running(2) as (engine, stubs, pool):
            stubs[0].is_held = stubs[1].is_held = True
            requests = make_requests(4)
            await engine.submit(requests)
            await stubs[0].wait_for_running(2)
            stubs[1].release()
            await pool.leave("server0.life0")
            await take(engine, requests)
            assert [server.name for server in engine.servers] == ["server1.life0"]

    run(generate())


def test_without_any_server_the_run_stops_with_the_pools_reason() -> None:
    async def generate() -> None:
        async with running(1) as (engine, stubs, pool):
            stubs[0].is_held = True
            await engine.submit(make_requests(1))
            await stubs[0].wait_for_running(2)
            await pool.leave("server0.life0")
            with pytest.raises(RunError, match="no server is left"):
                await take(engine, [])
            with pytest.raises(RunError, match="no server is left"):
                await engine.submit(make_requests(1))

    run(generate())


def test_requests_wait_for_weights_as_long_as_the_trainer_takes() -> None:
    async def generate() -> None:
        async with running(1, start_timeout_s=0.1) as (engine, stubs, pool):
            stubs[0].is_held = True
            requests = make_requests(1)
            await engine.submit(requests)
            await stubs[0].wait_for_running(2)
            await pool.restart("server0.life0", "it hung")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await take(engine, requests)
            assert [server.policy_version for server in engine.servers] == [-1]
            await sync(engine, stubs, 0)
            await take(engine, requests)

    run(generate())


def test_requests_wait_for_servers_that_are_coming() -> None:
    async def generate() -> None:
        async with running(1, start_timeout_s=0.1) as (engine, stubs, pool):
            pool.num_coming = 1
            await pool.leave("server0.life0")
            requests = make_requests(1)
            await engine.submit(requests)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await take(engine, requests)
            pool.num_coming = 0
            await pool.tell()
            with pytest.raises(RunError, match="no server is left"):
                await take(engine, requests)

    run(generate())


def test_an_answer_of_other_weights_is_refused_and_its_server_waits_for_weights() -> None:
    async def generate() -> None:
        async with running(2) as (engine, stubs, pool):
            # As a server that was restarted behind a proxy.
            stubs[0].weight_version = "7"
            requests = make_requests(8)
            await engine.submit(requests)
            results = await take(engine, requests)
            assert {result.policy_version for result in results.values()} == {0}
            assert {server.name: server.policy_version for server in engine.servers} == {
                "server0.life0": -1,
                "server1.life0": 0,
            }
            assert not pool.restarts

    run(generate())


def test_a_request_that_always_fails_stops_the_run_and_names_every_attempt() -> None:
    async def generate() -> None:
        async with running(2, max_attempts=3) as (engine, stubs, _):
            for stub in stubs:
                stub._generate = lambda payload: refuse()
            await engine.submit(make_requests(1, group_size=1))
            with pytest.raises(RunError) as told:
                await take(engine, [])
            text = str(told.value)
            assert text.startswith("request p0#0 failed 3 times (rollout.sglang.max_attempts): (1) ")
            assert text.count("status 500") == 3 and stubs[0].url in text and stubs[1].url in text

    async def refuse() -> Any:
        from aiohttp import web

        return web.Response(status=500, text="Internal Server Error")

    run(generate())


def test_a_response_goes_on_from_its_tokens() -> None:
    async def generate() -> None:
        async with running(1) as (engine, stubs, _):
            requests = make_requests(1, group_size=1, begun_token_ids=np.array([7, 8], dtype=np.int32))
            await engine.submit(requests)
            (result,) = (await take(engine, requests)).values()
            assert len(result.token_ids) == 4
            assert stubs[0].requests[0]["input_ids"] == [0, 0, 3, 7, 8]

    run(generate())


def test_servers_that_do_not_tell_experts_are_refused_where_they_are_replayed() -> None:
    async def generate() -> None:
        async with serving(1) as stubs:
            shape = RoutingShape(num_layers=1, moe_layers=(0,), num_experts=2, experts_per_token=1)
            config = RolloutConfig(engine="sglang", sglang=SglangConfig())
            async with SglangEngine(StubPool(stubs), config, VOCABULARY, shape) as engine:
                await engine.submit(make_requests(1))
                with pytest.raises(RunError, match="--enable-return-routed-experts"):
                    await take(engine, [])

    run(generate())


def test_closing_leaves_no_task_behind() -> None:
    async def generate() -> None:
        async with running(2) as (engine, stubs, _):
            stubs[0].is_held = stubs[1].is_held = True
            await engine.submit(make_requests(4))
            await stubs[0].wait_for_running(1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(generate())
