"""The controller's ear for node agents: HTTP on loopback or the job's network, with a token of the job's own.

A call is JSON both ways. `POST /agents` registers an agent; `POST /agents/KEY` brings reports and gives orders, and is
how either side knows that the other one lives; `DELETE /agents/KEY` is an agent's good-bye.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from aiohttp import web

from megatron_fipo.config.base import require
from megatron_fipo.rollout.servers.registry import Report, ServerRegistry

AGENT_LOST_S = 15.0
"""Silence after which an agent counts as lost, with its servers."""
_CHECK_EVERY_S = 1.0


class ServerListener:
    """Lets agents speak to a registry.

    Args:
        registry: The registry.
        token: What agents have to show.
    """

    def __init__(self, registry: ServerRegistry, token: str) -> None:
        self._registry = registry
        self._token = token
        self._runner = web.AppRunner(self._application())

    async def open(self, host: str) -> str:
        """Listen at an address; returns the URL for agents."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, 0).start()
        return f"http://{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def watch_agents(self) -> None:
        """Have agents counted as lost that fall silent; for ever."""
        loop = asyncio.get_running_loop()
        while True:
            asked_at = loop.time()
            await asyncio.sleep(_CHECK_EVERY_S)
            # What agents said while this process itself was busy or stopped is yet to be heard.
            late_s = loop.time() - asked_at - _CHECK_EVERY_S
            if late_s < _CHECK_EVERY_S:
                self._registry.lose_silent_agents(AGENT_LOST_S)
            else:
                for agent in self._registry.agents:
                    agent.seen_at += late_s

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._check_token])
        application.add_routes(
            [
                web.post("/agents", self._register),
                web.post("/agents/{key}", self._hear),
                web.delete("/agents/{key}", self._part),
            ]
        )
        return application

    @web.middleware
    async def _check_token(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        shown = request.headers.get("Authorization", "")
        if not hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
            raise web.HTTPUnauthorized
        return await handler(request)

    async def _register(self, request: web.Request) -> web.Response:
        message = await request.json()
        agent = self._registry.register(message["host"], message["free_port"])
        if agent is None:
            reason = "ends" if self._registry.closing else "has all the agents that rollout.sglang.num_agents asks for"
            raise web.HTTPConflict(text=f"the run {reason}")
        settings = asdict(self._registry.settings)
        return web.json_response({"key": agent.key, "api_key": self._registry.api_key, "settings": settings})

    async def _hear(self, request: web.Request) -> web.Response:
        agent = next((each for each in self._registry.agents if each.key == request.match_info["key"]), None)
        if agent is None:
            raise web.HTTPGone(text="this agent was not heard of for too long; its servers are not counted on any more")
        message = await request.json()
        agent.free_port = message["free_port"]
        orders = self._registry.hear(agent, [Report(**report) for report in message["reports"]])
        return web.json_response({"orders": [asdict(order) for order in orders], "end": self._registry.closing})

    async def _part(self, request: web.Request) -> web.Response:
        for agent in self._registry.agents:
            if agent.key == request.match_info["key"]:
                self._registry.lose(agent, f"the agent of rollout node {agent.place} has ended")
        return web.Response()


def job_address(environment: Mapping[str, str]) -> str:
    """This node's address in the job's network: that of its name in Slurm, or of the host's name.

    Args:
        environment: The process's environment.

    Raises:
        ConfigError: Other nodes cannot reach this one there. A loopback address that SLURMD_NODENAME itself gives is
            taken: all nodes are on one machine then.
    """
    given = environment.get("SLURMD_NODENAME")
    name = given or socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    require(
        bool(address) and (not is_loopback(address) or (given is not None and is_loopback(given))),
        field="SLURMD_NODENAME" if given else "this host's name",
        value=name,
        rule=f"must lead other nodes here, and it stands for {address or 'no address'}",
        way_out="set SLURMD_NODENAME, in the training job's environment, to this node's address in the job's network",
    )
    return address


def is_loopback(host: str) -> bool:
    """Whether a host is written as one that every node finds in itself."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def write_controller_file(path: Path, url: str, token: str) -> None:
    """Leave the listener's address and token where agents of other nodes look; only this user can read them."""
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"url": url, "token": token}, file)
    partial.rename(path)
