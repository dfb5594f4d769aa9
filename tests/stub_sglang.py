"""Servers that speak SGLang's HTTP as the rollout engine needs it, without a model: cheap, and on command."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from megatron_fipo.rollout.servers.registry import ServerLife
from megatron_fipo.rollout.sglang.client import policy_version_of
from megatron_fipo.runtime.errors import RunError

VOCABULARY = 500
MAX_REQUEST_INPUT = 996


def expected_tokens(input_ids: Sequence[int], count: int) -> list[int]:
    """What a stub answers to a prompt."""
    return np.random.default_rng([len(input_ids), *input_ids]).integers(0, VOCABULARY, count).tolist()


def expected_log_prob(token_id: int, version: int) -> float:
    """The log-probability that a stub with weights of a version gives a token; exact in float32."""
    return -(token_id % 32) / 8 - version


@dataclass(eq=False)
class _Running:
    """A request that a stub works on; `spans` are of weights that it had before."""

    rid: str
    input_ids: list[int]
    count: int
    spans: list[tuple[str, int]] = field(default_factory=list)
    ends: asyncio.Event = field(default_factory=asyncio.Event)


class StubSglang:
    """One server.

    Attributes:
        weight_version: As SGLang writes it.
        is_held: Whether requests run until they are aborted or `release` is called.
        is_silent: Whether nothing is answered any more.
        requests: Bodies of all requests that came to be generated.
        lives: Times that it was restarted.
    """

    def __init__(self) -> None:
        self.weight_version, self.is_held, self.is_silent = "default", False, False
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.lives = 0
        self.api_key: str | None = None
        self.running: set[_Running] = set()
        self._connections: set[asyncio.BaseTransport] = set()
        self._may_run, self._news, self._closing = asyncio.Event(), asyncio.Condition(), asyncio.Event()
        self._may_run.set()
        self.url = ""

    async def wait_for_running(self, count: int) -> None:
        """Return once so many requests run."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.running) >= count)

    def release(self) -> None:
        """Finish what runs, and hold nothing more."""
        self.is_held = False
        for each in self.running:
            each.ends.set()

    def restart(self) -> None:
        """Forget weights and requests, as a new process."""
        self.lives += 1
        self.weight_version, self.is_silent, self.is_held = "default", False, False
        self._may_run.set()
        self.release()

    def set_version(self, policy_version: int) -> None:
        """Take in weights: half of what runs is done by then."""
        for each in self.running:
            each.spans.append((self.weight_version, each.count // 2))
        self.weight_version = str(policy_version)

    def cut_connections(self) -> None:
        """Answer nothing of what was asked, as a process that is killed."""
        for connection in self._connections:
            assert isinstance(connection, asyncio.Transport)
            connection.abort()
        self._connections.clear()

    async def close(self) -> None:
        """Let go of whoever waits."""
        self._closing.set()
        self._may_run.set()
        self.release()

    async def handle(self, request: web.Request) -> web.Response:
        call = request.path.removeprefix("/")
        self.calls.append(call)
        assert request.transport is not None
        self._connections.add(request.transport)
        if self.is_silent:
            await self._closing.wait()
        is_open = self.api_key is None or call.startswith("health")
        if not is_open and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _json({"error": "Unauthorized"}, 401)
        body = await request.read()
        payload = orjson.loads(body) if body else {}
        answer = getattr(self, f"_{call}", None)
        if answer is None:
            return _json({"detail": "Not Found"}, 404)
        return await answer(payload)

    async def _generate(self, payload: dict[str, Any]) -> web.Response:
        self.requests.append(payload)
        ids = payload["input_ids"]
        if not ids or min(ids) < 0 or max(ids) >= VOCABULARY:
            self.is_silent = True
            return _json({"error": {"message": "it died of this"}}, 500)
        running = _Running(payload["rid"], ids, payload["sampling_params"]["max_new_tokens"])
        await self._may_run.wait()
        self.running.add(running)
        async with self._news:
            self._news.notify_all()
        try:
            if self.is_held:
                await running.ends.wait()
        finally:
            self.running.discard(running)
        return _json(self.answer(running))

    def answer(self, running: _Running) -> dict[str, Any]:
        """What SGLang would say; an aborted request has half of its tokens."""
        aborted = running.ends.is_set() and self.is_held
        count = running.count // 2 if aborted else running.count
        tokens = expected_tokens(running.input_ids, running.count)[:count]
        ends = [*running.spans, (self.weight_version, count)]
        spans, start = [], 0
        for version, end in ends:
            if min(end, count) > start:
                spans.append({"version": version, "start": start, "end": min(end, count)})
                start = min(end, count)
        versions = [policy_version_of(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
        finish = {"type": "abort", "message": "Aborted"} if aborted else {"type": "length", "length": count}
        return {
            "text": "",
            "output_ids": tokens,
            "meta_info": {
                "id": running.rid,
                "finish_reason": finish,
                "weight_version": self.weight_version,
                "output_token_logprobs": [
                    [expected_log_prob(token, version), token, None]
                    for token, version in zip(tokens, versions, strict=True)
                ],
                "completion_tokens": count,
                "weight_versions": spans,
            },
        }

    async def _model_info(self, payload: Any) -> web.Response:
        return _json({"weight_version": self.weight_version})

    async def _server_info(self, payload: Any) -> web.Response:
        return _json(
            {
                "internal_states": [{"weight_version": self.weight_version}],
                "tp_size": 1,
                "base_gpu_id": 0,
                "max_req_input_len": MAX_REQUEST_INPUT,
                "enable_deterministic_inference": False,
                "enable_return_routed_experts": False,
                "version": "0.5.21",
            }
        )

    async def _health(self, payload: Any) -> web.Response:
        return web.Response()

    async def _health_generate(self, payload: Any) -> web.Response:
        await self._may_run.wait()
        return web.Response()

    async def _pause_generation(self, payload: Any) -> web.Response:
        self._may_run.clear()
        if payload["mode"] == "abort":
            for each in self.running:
                each.ends.set()
        return _json({"status": "ok"})

    async def _continue_generation(self, payload: Any) -> web.Response:
        self._may_run.set()
        return _json({"status": "ok"})

    async def _abort_request(self, payload: Any) -> web.Response:
        for each in self.running:
            if each.rid.startswith(payload["rid"]):
                each.ends.set()
        return web.Response()


class StubPool:
    """A pool of stubs; a restarted one is another life at the same address.

    Attributes:
        api_key: What the servers ask for.
        lives: Those that are there.
        num_coming: Those that are being started.
        restarts: (name, reason) of each restart.
        may_restart: Whether servers come back.
    """

    def __init__(self, stubs: Sequence[StubSglang], urls: Sequence[str] | None = None) -> None:
        self.api_key: str | None = None
        self.stubs = stubs
        self.lives = [
            ServerLife(name=f"server{number}.life0", url=url, tensor_parallel_size=1, may_restart=True)
            for number, url in enumerate(urls or [stub.url for stub in stubs])
        ]
        self.num_coming = 0
        self.restarts: list[tuple[str, str]] = []
        self.may_restart = True
        self._changed = asyncio.Condition()

    async def wait_for_change(self, known: Sequence[ServerLife], known_coming: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.lives != list(known) or self.num_coming != known_coming)
        if not self.lives and not self.num_coming:
            raise RunError(f"no server is left: {self.restarts}")

    async def restart(self, name: str, reason: str) -> None:
        place = next((place for place, life in enumerate(self.lives) if life.name == name), None)
        if place is None:
            return
        self.restarts.append((name, reason))
        stem, number = name.rsplit("life", 1)
        life = self.lives.pop(place)
        if self.may_restart:
            self.stubs[int(stem.removeprefix("server").removesuffix("."))].restart()
            self.lives.insert(place, replace(life, name=f"{stem}life{int(number) + 1}"))
        await self.tell()

    async def leave(self, name: str) -> None:
        """A server ends by itself."""
        self.lives = [life for life in self.lives if life.name != name]
        await self.tell()

    async def tell(self) -> None:
        """Wake whoever waits for a change."""
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        pass


@asynccontextmanager
async def serving(count: int) -> AsyncIterator[list[StubSglang]]:
    """So many stubs, each on a port of its own."""
    async with AsyncExitStack() as stack:
        stubs = [StubSglang() for _ in range(count)]
        for stub in stubs:
            runner = web.ServerRunner(web.Server(stub.handle), shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            stack.push_async_callback(stub.close)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield stubs


def _json(content: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(content), content_type="application/json")
