import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import pytest

from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.servers.registry import ServerLife
from megatron_fipo.runtime.background import running
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.weight_supply import WeightSupply


class Fleet:
    """Servers that come and go on command; pool and engine in one."""

    api_key = None

    def __init__(self) -> None:
        self.servers: list[ServerAddress] = []
        self.unmet = 0
        self.num_coming = 0
        self.is_paused = False
        self.versions: list[int] = []
        self.pushed: list[list[str]] = []
        self.refuses = False
        self.hopeless = False
        self.failure: Exception | None = None
        self.changed = asyncio.Event()
        self.next_change = asyncio.Event()

    @property
    def lives(self) -> list[ServerLife]:
        names = [server.name for server in self.servers] + [f"unmet{number}" for number in range(self.unmet)]
        return [ServerLife(name=name, url="http://x", tensor_parallel_size=1, may_restart=True) for name in names]

    def come(self, name: str) -> None:
        self.servers.append(ServerAddress(name=name, url="http://x", tensor_parallel_size=1, policy_version=-1))
        self.changed.set()
        self.tell()

    def tell(self) -> None:
        self.next_change.set()
        self.next_change = asyncio.Event()

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def wait_for_change(self, known: Sequence[ServerLife], known_coming: int) -> None:
        while list(known) == self.lives and known_coming == self.num_coming:
            if self.hopeless:
                raise RunError("no server is left")
            self.changed.clear()
            await self.changed.wait()

    async def pause(self, mode: PauseMode) -> None:
        assert self.servers
        self.is_paused = True

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        self.is_paused = False
        self.versions.append(policy_version)
        told = {name for names in self.pushed for name in names} | {"first"}
        self.servers = [
            replace(server, policy_version=policy_version) if server.name in told else server
            for server in self.servers
            if server.name not in failed
        ]
        self.tell()

    async def push(self, servers: Sequence[ServerAddress]) -> Mapping[str, str] | None:
        assert not self.is_paused
        if self.refuses:
            await asyncio.sleep(0)
            return None
        self.pushed.append([server.name for server in servers])
        return {}

    def supply(self) -> WeightSupply:
        return WeightSupply(self, self, self, "abort", self.push)  # type: ignore[arg-type]


async def until_served(fleet: Fleet, version: int) -> None:
    while any(server.policy_version != version for server in fleet.servers):
        await asyncio.sleep(0.01)


def test_the_first_pause_waits_for_all_servers() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.num_coming = 2
        paused = asyncio.create_task(fleet.supply().pause())
        fleet.come("first")
        fleet.num_coming = 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not paused.done()
        fleet.come("second")
        fleet.num_coming = 0
        assert [server.name for server in await paused] == ["first", "second"]

    asyncio.run(scenario())


def test_a_pause_waits_until_the_engine_knows_the_servers_of_the_pool() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.unmet = 2
        paused = asyncio.create_task(fleet.supply().pause())
        fleet.unmet = 1
        fleet.come("first")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not paused.done()
        # The other one has ended unmet.
        fleet.unmet = 0
        fleet.tell()
        assert [server.name for server in await paused] == ["first"]

    asyncio.run(scenario())


def test_a_pause_ends_with_an_error_where_no_server_will_come() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.hopeless = True
        with pytest.raises(RunError, match="no server is left"):
            await fleet.supply().pause()

    asyncio.run(scenario())


@pytest.mark.parametrize("failed_before", [True, False])
def test_a_pause_ends_with_the_error_of_an_engine_that_refuses_a_server(failed_before: bool) -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.unmet = 1

        def fail() -> None:
            fleet.failure = RunError("the server lacks a flag")
            fleet.tell()

        if failed_before:
            fail()
        else:
            asyncio.get_running_loop().call_soon(fail)
        with pytest.raises(RunError, match="the server lacks a flag"):
            await asyncio.wait_for(fleet.supply().pause(), 10)

    asyncio.run(scenario())


def test_a_server_that_comes_later_is_given_weights() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.come("first")
        supply = fleet.supply()
        async with running(supply.run()):
            await supply.pause()
            await supply.resume(3, ())
            fleet.come("later")
            await until_served(fleet, 3)
        assert fleet.pushed == [["later"]]
        assert fleet.versions == [3, 3]

    asyncio.run(scenario())


def test_a_server_that_comes_while_others_are_paused_waits_for_their_resume() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.come("first")
        supply = fleet.supply()
        async with running(supply.run()):
            await supply.pause()
            await supply.resume(0, ())
            await supply.pause()
            fleet.come("later")
            assert [server.name for server in await supply.pause()] == ["first", "later"]
            await supply.resume(1, ())
            await until_served(fleet, 1)
        assert fleet.pushed == [["later"]]

    asyncio.run(scenario())


def test_weights_that_are_about_to_change_are_not_waited_for() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.come("first")
        supply = fleet.supply()
        async with running(supply.run()):
            await supply.pause()
            await supply.resume(0, ())
            fleet.refuses = True
            fleet.come("later")
            assert len(await asyncio.wait_for(supply.pause(), 30)) == 2
            fleet.refuses = False
            await supply.resume(1, ())
            await until_served(fleet, 1)

    asyncio.run(scenario())
