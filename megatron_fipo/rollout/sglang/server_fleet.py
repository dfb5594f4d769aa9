"""The servers while an engine uses them: their acquaintance, health and versions of weights, and who is to blame.

A server that hangs is restarted; one that does not have the weights it should have serves no requests until it has.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol

import aiohttp

from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.servers.registry import ServerLife, ServerPool
from megatron_fipo.rollout.sglang.client import (
    FOLDER_VERSION,
    PROBE_TIMEOUT_S,
    ServerError,
    SglangServer,
)
from megatron_fipo.rollout.sglang.generate_responses import ResponseError
from megatron_fipo.rollout.sglang.server_choice import Server
from megatron_fipo.runtime.errors import RunError

logger = logging.getLogger(__name__)

PROBE_INTERVAL_S = 15.0
PROBE_AGAIN_S = 2.0
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 10.0

MAX_FAILED_PROBES = 2
MAX_FAILURES_IN_A_ROW = 16
_jitter = random.Random()


def back_off_s(failures: int) -> float:
    """How long to wait after so many failures, at random around a time that doubles."""
    return min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2**failures) * _jitter.uniform(0.5, 1.5)


class MoveFlights(Protocol):
    """Begins requests of a server elsewhere, and on request those that a router may have sent there."""

    def __call__(self, server: Server, reason: str, with_routed: bool) -> None:
        """Return at once."""
        ...


class ServerFleet:
    """Servers, from one event loop.

    Args:
        pool: Where they come from; it has them restarted.
        config: How often their acquaintance is tried.
        session: Connections to them.
        with_routing: Whether they have to tell the experts they choose.
        start: Runs something in the background; what it raises ends the engine.
        move: What becomes of the requests of a server that serves no more.
        wake: Called where requests may find a server that did not before.

    Attributes:
        policy_version: Version that those which serve have.
        is_running: Set but between `pause` and `resume`.
        next_change: Is set as soon as `addresses`, or the servers of the pool, are others than now.
    """

    def __init__(
        self,
        pool: ServerPool,
        config: SglangConfig,
        session: aiohttp.ClientSession,
        *,
        with_routing: bool,
        start: Callable[[Coroutine[Any, Any, None]], None],
        move: MoveFlights,
        wake: Callable[[], None],
    ) -> None:
        self._pool, self._config, self._session, self._with_routing = pool, config, session, with_routing
        self._start, self._move, self._wake = start, move, wake
        self._servers: dict[str, Server] = {}
        self._known_lives: set[str] = set()
        self.policy_version = FOLDER_VERSION
        self.is_running = asyncio.Event()
        self.is_running.set()
        self.next_change = asyncio.Event()

    @property
    def addresses(self) -> Sequence[ServerAddress]:
        """Servers that answer, those that wait for weights included, in an order that restarts do not change."""
        known = (self._servers.get(life.name) for life in self._pool.lives)
        return [server.address for server in known if server is not None]

    @property
    def serving(self) -> Sequence[Server]:
        """Those that have the version."""
        version = self.policy_version
        return [server for server in self._servers.values() if server.policy_version == version != FOLDER_VERSION]

    def has(self, server: Server) -> bool:
        """Whether a server is still there."""
        return self._servers.get(server.life.name) is server

    async def pause(self, mode: PauseMode) -> None:
        """Have every server stop where it is."""
        self.is_running.clear()
        await asyncio.gather(*(self._pause_server(server, mode) for server in list(self._servers.values())))

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        """Go on with all servers that have a version; those that failed to take it in are restarted.

        Raises:
            RunError: No server is left.
        """
        self.policy_version = policy_version
        await asyncio.gather(
            *(
                self._give_up(server, f"it did not take in policy version {policy_version}")
                if server.life.name in failed
                else self._resume_server(server, policy_version)
                for server in list(self._servers.values())
            )
        )
        self.is_running.set()
        self._wake()
        if not self._servers and not self._pool.num_coming and not self._pool.lives:
            raise RunError("no server is left that could take in weights; their logs tell why they ended")

    def halt(self) -> None:
        """Have nothing more sent, because the engine has failed."""
        self.is_running.clear()
        self._tell_change()

    async def follow_pool(self) -> None:
        """Keep up with the servers that come and go."""
        known: list[ServerLife] = []
        coming = -1
        while True:
            await self._pool.wait_for_change(known, coming)
            known, coming = list(self._pool.lives), self._pool.num_coming
            names = {life.name for life in known}
            for server in list(self._servers.values()):
                if server.life.name not in names:
                    self._leave(server, "it is gone")
            for life in known:
                if life.name not in self._known_lives:
                    self._known_lives.add(life.name)
                    self._start(self._admit(life))
            self._tell_change()

    async def _admit(self, life: ServerLife) -> None:
        """Make the acquaintance of a new server, and watch it as long as it lives."""
        client = SglangServer(life.url, self._session)
        for attempt in range(self._config.max_attempts):
            try:
                info = await client.info()
                break
            except ServerError as error:
                problem = str(error)
                await asyncio.sleep(back_off_s(attempt))
        else:
            await self._pool.restart(life.name, problem)
            return
        if self._with_routing and not info.returns_routed_experts:
            raise RunError(
                f"{life.url} does not tell the experts it chose, which rollout.replay_routing needs; start it with "
                "--enable-return-routed-experts"
            )
        # Whatever version it claims, it was not this run that gave it the weights.
        server = Server(life=life, client=client, info=info)
        if life in self._pool.lives:
            self._servers[life.name] = server
            self._tell_change()
            await self._watch(server)

    async def _watch(self, server: Server) -> None:
        """Ask for the server's health now and then, and where a request failed there."""
        failed = 0
        while self.has(server):
            if failed:
                await asyncio.sleep(PROBE_AGAIN_S)
            else:
                await _wait_for(server.suspected, PROBE_INTERVAL_S)
            await self.is_running.wait()
            try:
                await server.client.check_health(PROBE_TIMEOUT_S)
            except ServerError as error:
                # A paused server answers no probe.
                failed += self.is_running.is_set()
                if failed >= MAX_FAILED_PROBES:
                    await self._give_up(server, str(error))
            else:
                failed = 0
                server.suspected.clear()
                self._wake()

    async def _pause_server(self, server: Server, mode: PauseMode) -> None:
        try:
            await server.client.pause_generation(mode)
        except ServerError as error:
            await self._give_up(server, str(error))

    async def _resume_server(self, server: Server, policy_version: int) -> None:
        """Let a server serve if every worker of it has the version."""
        try:
            info = await server.client.info()
            if set(info.policy_versions) != {policy_version}:
                self._retire(
                    server, f"it has policy versions {sorted(set(info.policy_versions))}, not {policy_version}"
                )
                return
            # Tokens of the new version may come as soon as it goes on.
            server.policy_version = policy_version
            self._tell_change()
            await server.client.continue_generation()
        except ServerError as error:
            await self._give_up(server, str(error))

    async def _give_up(self, server: Server, reason: str) -> None:
        """Have a server restarted."""
        if self.has(server):
            self._leave(server, reason)
            await self._pool.restart(server.life.name, reason)
            self._wake()

    def _leave(self, server: Server, reason: str) -> None:
        # The pool says why.
        logger.warning(
            "%s at %s serves no more; %d requests move", server.life.name, server.life.url, len(server.flights)
        )
        del self._servers[server.life.name]
        self._tell_change()
        # One that is restarted ends, and the router answers what it had there. But what a server answers while weights
        # change may be of weights that are never verified, and a routed answer does not tell whose it is.
        with_routed = not server.life.may_restart or not self.is_running.is_set()
        self._move(server, f"{server.life.name}: {reason}", with_routed)

    def _retire(self, server: Server, reason: str) -> None:
        """Take a server out of service until it has been given weights."""
        if server.policy_version != FOLDER_VERSION or server.flights:
            logger.warning("%s serves no more until its weights are synchronised: %s", server.life.url, reason)
        served = server.policy_version != FOLDER_VERSION
        server.policy_version = FOLDER_VERSION
        self._tell_change()
        self._move(server, f"{server.life.name}: {reason}", with_routed=served)

    def blame(self, server: Server, error: ServerError | ResponseError) -> None:
        """Draw the conclusion about the server of a failed attempt."""
        server.failures_in_a_row += 1
        if not self.has(server):
            return
        if server.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self._start(self._give_up(server, str(error)))
        elif isinstance(error, ServerError):
            # One that was late may have queued for long at a sound server: its probes tell.
            server.suspected.set()
        elif error.kind == "version":
            self._retire(server, str(error))

    def _tell_change(self) -> None:
        self.next_change.set()
        self.next_change = asyncio.Event()
        self._wake()


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Return when the event is set, or after a while."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
