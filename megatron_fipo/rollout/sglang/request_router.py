"""sglang-router in front of the servers: it gets requests, and nothing else; whatever controls a server is said to it.

Which server has a request is not known then. So a failure on this way is blamed on nobody, and the request's next
attempt goes straight to a server, where a failure shows whose it is. The router's list of servers is made to follow
those that may serve; while the two differ, and once the router is gone, requests go straight to servers.
"""

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from megatron_fipo.config.base import require
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.servers.process import ServerEndedError, ServerProcess
from megatron_fipo.rollout.sglang.client import SglangServer, open_session
from megatron_fipo.rollout.sglang.server_choice import Flight, Server
from megatron_fipo.runtime.background import running
from megatron_fipo.runtime.child_process import child_environment
from megatron_fipo.runtime.errors import RunError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0
PROBE_INTERVAL_S = 15.0
PROBE_TIMEOUT_S = 30.0
MAX_FAILED_PROBES = 2
_SETTLE_S = 0.1
_NO_ANSWER = (aiohttp.ClientError, TimeoutError, OSError, KeyError, TypeError, ValueError)
_STOP_GRACE_S = 1.0
# A server that joins is asked for its health, again and again until then.
_JOIN_TIMEOUT_S = 30
# The engine gives a request up before the router does.
_TIMEOUT_MARGIN_S = 60


def check_router(config: SglangConfig) -> None:
    """Refuse a router where there is none.

    Raises:
        ConfigError: sglang-router is not installed.
    """
    require(
        not config.use_router or importlib.util.find_spec("sglang_router") is not None,
        field="rollout.sglang.use_router",
        value=True,
        rule="needs the package sglang-router, which is not installed",
        way_out="`pip install sglang-router==0.3.2`, or set it to false",
    )


@asynccontextmanager
async def open_router(
    config: RolloutConfig, api_key: str | None, folder: Path
) -> AsyncIterator["RequestRouter | None"]:
    """Start a router beside this process, with which it ends; None where the configuration asks for none.

    Args:
        config: Requests, and whether there is to be a router.
        api_key: What the servers ask for; the router asks for the same.
        folder: Where its log goes.

    Raises:
        RunError: It does not start.
    """
    if not config.sglang.use_router:
        yield None
        return
    url, settings = _settings(config, api_key)
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / f"router_{secrets.token_hex(8)}.json"
    with open(os.open(settings_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(settings, file)
    command = [sys.executable, "-P", "-m", "megatron_fipo.rollout.sglang.router_program", str(settings_file)]
    try:
        process = await ServerProcess.start(command, child_environment(), folder / "router.log")
        ended = asyncio.ensure_future(process.wait())
        try:
            async with open_session(api_key, config.max_requests_in_flight) as session:
                router = RequestRouter(url, session, api_key)
                await _wait_ready(router, ended)
                async with running(router.follow(ended, process.group)):
                    yield router
        finally:
            if not ended.done():
                ended.cancel()
                await asyncio.gather(ended, return_exceptions=True)
                await process.stop(_STOP_GRACE_S)
    except ServerEndedError as error:
        raise RunError(f"rollout.sglang.use_router: {error}") from error
    finally:
        settings_file.unlink()


def _settings(config: RolloutConfig, api_key: str | None) -> tuple[str, dict[str, Any]]:
    """The router's address and all that it is told.

    It neither repeats a request nor leaves a server out by itself: both are the engine's, which has to know of them. Of
    its ways to choose a server, only that by a name works for prompts of token ids: a group stays on one server.
    """
    with socket.create_server((LOOPBACK, 0)) as first, socket.create_server((LOOPBACK, 0)) as second:
        port, metrics_port = first.getsockname()[1], second.getsockname()[1]
    settings = {
        "host": LOOPBACK,
        "port": port,
        "prometheus_host": LOOPBACK,
        "prometheus_port": metrics_port,
        "api_key": api_key,
        "policy": "manual",
        "assignment_mode": "min_load",
        "disable_retries": True,
        "disable_circuit_breaker": True,
        "disable_health_check": True,
        "worker_startup_timeout_secs": _JOIN_TIMEOUT_S,
        "worker_startup_check_interval": 1,
        "request_timeout_secs": int(config.sglang.request_timeout_s) + _TIMEOUT_MARGIN_S,
        "shutdown_grace_period_secs": 0,
        "log_level": "warn",
    }
    return f"http://{LOOPBACK}:{port}", settings


async def _wait_ready(router: "RequestRouter", ended: "asyncio.Future[str]") -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await router.answers():
                await asyncio.wait([ended], timeout=_SETTLE_S)
                if ended.done():
                    raise RunError(f"rollout.sglang.use_router: the router {ended.result()}")
    except TimeoutError:
        raise RunError(
            f"rollout.sglang.use_router: the router did not answer within {START_TIMEOUT_S:g} s; see router.log"
        ) from None


class RequestRouter:
    """A router that runs, as one way that requests may take.

    Args:
        url: Where it answers.
        session: Connections to it.
        api_key: What the servers ask for.

    Attributes:
        name: What it is called where requests are told apart by their way.
        client: Speaks to it.
        flights: Requests that were sent to it and are not answered.
        servers: Those that it chose from when `reaches` was last true.
    """

    name = "the router"

    def __init__(self, url: str, session: aiohttp.ClientSession, api_key: str | None) -> None:
        self.client = SglangServer(url, session)
        self.flights: set[Flight] = set()
        self.servers: tuple[Server, ...] = ()
        self._url, self._session, self._api_key = url, session, api_key
        self._is_up = True
        self._wanted: set[str] = set()
        self._members: dict[str, str] = {}
        self._joining: dict[str, float] = {}
        self._changed = asyncio.Event()

    def reaches(self, serving: Sequence[Server]) -> bool:
        """Whether the router would choose from just these servers; if not, it is made to."""
        healthy = tuple(server for server in serving if not server.suspected.is_set())
        wanted = {server.life.url for server in healthy}
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()
        if not self._is_up or not wanted or not self._is_settled():
            return False
        self.servers = healthy
        return True

    async def generate(
        self, flight: Flight, body: bytes, timeout_s: float, before_reading: Callable[[], Awaitable[object]]
    ) -> bytes:
        """Send a request; the router keeps those of one prompt on one server."""
        headers = {"X-SMG-Routing-Key": flight.request.prompt_id}
        return await self.client.generate(body, timeout_s, before_reading, headers)

    async def answers(self) -> bool:
        """Whether it takes calls."""
        try:
            await self._list()
        except _NO_ANSWER:
            return False
        return True

    async def follow(self, ended: "asyncio.Future[str]", group: int) -> None:
        """Have it know the servers that may serve; return once it has ended or, where it answers no more, is ended.

        Args:
            ended: Done with the reason once its process has ended.
            group: Its process group.
        """
        ended.add_done_callback(lambda _: self._changed.set())
        failed = 0
        while not ended.done() and failed < MAX_FAILED_PROBES:
            self._changed.clear()
            try:
                await self._change_members()
                failed = 0
            except _NO_ANSWER as error:
                failed += 1
                log.warning("the router at %s did not answer: %s", self._url, type(error).__name__)
            settled = not failed and self._is_settled()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_INTERVAL_S if settled else _SETTLE_S):
                    await self._changed.wait()
        self._is_up = False
        if not ended.done():
            # What waits for it is answered by that.
            os.killpg(group, signal.SIGKILL)
        log.warning("the router %s; from now on requests go straight to the servers", await ended)

    def _is_settled(self) -> bool:
        """Whether it has those servers that it is to have, and will not have others by itself."""
        return self._members.keys() == self._wanted and not self._joining

    async def _change_members(self) -> None:
        """Have servers join and leave, which both take a while."""
        self._members, now = await self._list(), asyncio.get_running_loop().time()
        self._joining = {
            url: since
            for url, since in self._joining.items()
            if url not in self._members and now < since + _JOIN_TIMEOUT_S
        }
        for url in self._wanted - self._members.keys() - self._joining.keys():
            self._joining[url] = now
            await self._ask("POST", "workers", {"url": url, "api_key": self._api_key})
        for url in self._members.keys() - self._wanted:
            with contextlib.suppress(aiohttp.ClientResponseError):
                await self._ask("DELETE", f"workers/{self._members[url]}")

    async def _list(self) -> dict[str, str]:
        """Its servers: their names there by address."""
        told = await self._ask("GET", "workers")
        return {worker["url"]: worker["id"] for worker in told["workers"]}

    async def _ask(self, method: str, path: str, payload: dict[str, Any] | None = None) -> Any:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with self._session.request(method, f"{self._url}/{path}", json=payload, timeout=timeout) as reply:
            reply.raise_for_status()
            return await reply.json()
