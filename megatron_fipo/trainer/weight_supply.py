"""Sees to it that servers have the current weights, also those that come in the middle of a rollout."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol

from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.servers.registry import ServerPool

type Push = Callable[[Sequence[ServerAddress]], Awaitable[Mapping[str, str] | None]]
"""Gives servers the current weights; returns why some did not take them in, by name, or None where newer ones come."""


class Pausable(Protocol):
    """What stops and goes on as a whole: a controller with its engine, or an engine alone."""

    async def pause(self, mode: PauseMode) -> None:
        """Stop where it is."""
        ...

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        """Go on with the servers that have a version."""
        ...


class Servers(Protocol):
    """Servers as an engine knows them."""

    @property
    def servers(self) -> Sequence[ServerAddress]:
        """Those that are there now, those that wait for weights included."""
        ...

    @property
    def next_change(self) -> asyncio.Event:
        """Is set as soon as these servers, or those that it gets them from, are others than now; and on a failure."""
        ...

    def raise_failure(self) -> None:
        """Raise what has made the engine fail, if anything has."""
        ...


class WeightSupply:
    """Servers between two versions, and servers that have none; all of it belongs to one event loop.

    Args:
        generation: Is stopped while weights change.
        engine: Has the servers.
        pool: Where they come from.
        mode: What becomes of running requests while weights change.
        push: Gives servers weights in the middle of a rollout.
    """

    def __init__(self, generation: Pausable, engine: Servers, pool: ServerPool, mode: PauseMode, push: Push) -> None:
        self._generation, self._engine, self._pool, self._mode, self._push = generation, engine, pool, mode, push
        self._policy_version = -1
        self._is_paused = False
        # Held while servers are given weights, by whomever.
        self._lock = asyncio.Lock()

    async def pause(self) -> Sequence[ServerAddress]:
        """Wait until there are servers, and stop them where they are until `resume`; the first time, until all are.

        May be called again while they are stopped, for those that have come since.

        Returns:
            The servers.

        Raises:
            RunError: No server is left and none will come, or the engine has failed.
        """
        if not self._is_paused:
            await self._lock.acquire()
            self._is_paused = True
        await self._wait_for_servers()
        await self._generation.pause(self._mode)
        return self._engine.servers

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        """Go on with the servers that have a version.

        Raises:
            RunError: No server is left and none will come.
        """
        await self._generation.resume(policy_version, failed)
        self._policy_version = policy_version
        self._is_paused = False
        self._lock.release()

    async def run(self) -> None:
        """Have servers that come later given weights, for ever."""
        while True:
            # Asked for first: servers may come while the others are looked at.
            change = self._engine.next_change
            async with self._lock:
                waiting = self._waiting()
                failed = await self._push(waiting) if waiting else None
                if failed is not None:
                    await self._generation.resume(self._policy_version, failed)
            await change.wait()

    def _waiting(self) -> list[ServerAddress]:
        if self._policy_version < 0:
            return []
        return [server for server in self._engine.servers if server.policy_version != self._policy_version]

    async def _wait_for_servers(self) -> None:
        known, coming = list(self._pool.lives), self._pool.num_coming
        while not known or (coming and self._policy_version < 0):
            await self._pool.wait_for_change(known, coming)
            known, coming = list(self._pool.lives), self._pool.num_coming
        while len(self._engine.servers) < len(self._pool.lives):
            # A server that the engine refuses never becomes one of its own.
            self._engine.raise_failure()
            await self._engine.next_change.wait()
