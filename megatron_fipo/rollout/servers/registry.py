"""Which servers a run has: their lives, the nodes they are on, and what their agents are to do next.

A server's ranks are on one node, or on several. Each node has an agent (`agent.py`), which reports what it runs and
is told what it is to run; it decides nothing. Restarts are decided here, so that the parts of a server that is spread
over nodes begin and end together.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_fipo.rollout.servers.command import ServerSettings
from megatron_fipo.runtime.errors import RunError

log = logging.getLogger(__name__)

FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0
SOUND_LIFE_S = 3600.0
"""A server that has been ready for so long is as good as new: its restarts are counted anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLife:
    """A server from the moment it is ready until it ends; its successor is another life with another name.

    Attributes:
        name: Names this life, as in "server1.life2".
        url: Where it answers, such as http://10.1.0.7:30000.
        tensor_parallel_size: Its ranks.
        may_restart: Whether `ServerPool.restart` can give it a successor; false for a server that was attached to.
    """

    name: str
    url: str
    tensor_parallel_size: int
    may_restart: bool


class ServerPool(Protocol):
    """Where the engine gets its servers from. All of it belongs to one event loop."""

    @property
    def api_key(self) -> str | None:
        """What the servers ask for in `Authorization: Bearer …`; None where they ask for nothing."""
        ...

    @property
    def lives(self) -> Sequence[ServerLife]:
        """Servers that are ready, in an order that restarts do not change.

        Each has the model folder's weights at first, one that was attached to whatever it had. A server leaves as
        soon as its process, its node's agent, or the connection to that agent has ended.
        """
        ...

    @property
    def num_coming(self) -> int:
        """Servers that are being started, restarted, or waited for."""
        ...

    async def wait_for_change(self, known: Sequence[ServerLife], known_coming: int) -> None:
        """Return as soon as `lives` or `num_coming` differ from what the caller knows; at once if they do already.

        Raises:
            RunError: No server is left and none will come; the text says what became of them.
        """
        ...

    async def restart(self, name: str, reason: str) -> None:
        """End a life that does not answer, or has wrong weights; it leaves `lives` before this returns.

        Its successor comes by itself, unless the server was restarted too often or was attached to: then the run goes
        on without it. A life that is gone already is left alone.

        Args:
            name: The life.
            reason: For the log, and for the error where no server is left.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an agent is to run: a server's part on its node, in one life.

    Attributes:
        name: The life.
        index: Which server of the node it is.
        node_rank: Which of the server's nodes this is; the first one answers requests.
        init_address: HOST:PORT at which the parts meet, where there are several.
    """

    name: str
    index: int
    node_rank: int
    init_address: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of an order.

    Attributes:
        name: The life.
        url: Where it answers; None as long as it is not ready.
        ended: How it ended; None as long as it runs.
    """

    name: str
    url: str | None = None
    ended: str | None = None


@dataclass(slots=True, kw_only=True)
class Agent:
    """An agent that has registered.

    Attributes:
        key: Names it among all that ever registered.
        place: Which node of the run it has.
        host: Its node's address.
        free_port: A port that was free there a moment ago.
        seen_at: When it was heard of last, on the event loop's clock.
    """

    key: str
    place: int
    host: str
    free_port: int
    seen_at: float


@dataclass(slots=True)
class _Server:
    """A server through all its lives.

    Attributes:
        number: Which server of the run.
        places: Nodes of its parts, in the order of their ranks.
        index: Which server of these nodes.
        life: Number of its latest life; 0 before the first one.
        num_short_lives: Lives that have ended since it was last sound.
        runs: Whether the latest life is ordered.
        url: Where it answers; None as long as it is not ready.
        ready_at: Since when, on the event loop's clock.
        init_address: Where its parts meet.
        given_up: Why there will be no further life.
        back_off: What begins the next one.
    """

    number: int
    places: tuple[int, ...]
    index: int
    life: int = 0
    num_short_lives: int = 0
    runs: bool = False
    url: str | None = None
    ready_at: float = 0.0
    init_address: str | None = None
    given_up: str | None = None
    back_off: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return f"server{self.number}.life{self.life}"


@dataclass(slots=True)
class _Place:
    """A node of the run: its agent, or why it has none and gets none."""

    agent: Agent | None = None
    hopeless: str | None = None


@dataclass(slots=True)
class ServerRegistry:
    """The servers that agents run.

    Args:
        settings: Of all servers.
        num_agents: Agents to be expected.
        max_restarts: Times that one server is restarted.
        api_key: What servers ask for.
        agents_return: Whether an agent that is lost gets a successor by itself.
    """

    settings: ServerSettings
    num_agents: int
    max_restarts: int
    api_key: str
    agents_return: bool
    closing: bool = False
    _places: list[_Place] = field(init=False)
    _servers: list[_Server] = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        spread = self.settings.nodes_per_server
        self._places = [_Place() for _ in range(self.num_agents)]
        nodes = [tuple(range(first, first + spread)) for first in range(0, self.num_agents, spread)]
        shares = [(places, index) for places in nodes for index in range(self.settings.servers_per_node)]
        self._servers = [_Server(number, places, index) for number, (places, index) in enumerate(shares)]

    @property
    def lives(self) -> tuple[ServerLife, ...]:
        """See `ServerPool`."""
        return tuple(
            ServerLife(
                name=server.name,
                url=server.url,
                tensor_parallel_size=self.settings.tensor_parallel_size,
                may_restart=True,
            )
            for server in self._servers
            if server.url is not None
        )

    @property
    def num_coming(self) -> int:
        """See `ServerPool`."""
        return sum(server.url is None and self._why_gone(server) is None for server in self._servers)

    @property
    def agents(self) -> list[Agent]:
        """Those that have registered and are not lost."""
        return [place.agent for place in self._places if place.agent is not None]

    async def wait_for_change(self, known: Sequence[ServerLife], known_coming: int) -> None:
        """See `ServerPool`."""
        while True:
            if not self.lives and self.num_coming == 0:
                reasons = [f"server {server.number}: {self._why_gone(server)}" for server in self._servers]
                raise RunError("no SGLang server is left; " + "; ".join(reasons))
            if self.lives != tuple(known) or self.num_coming != known_coming:
                return
            await self._changed.wait()

    async def restart(self, name: str, reason: str) -> None:
        """See `ServerPool`."""
        for server in self._servers:
            if server.runs and server.name == name:
                self._end(server, reason)

    def register(self, host: str, free_port: int) -> Agent | None:
        """Give an agent a node that has none; None where all have one."""
        place = next((number for number, place in enumerate(self._places) if place.agent is None), None)
        if place is None or self.closing:
            return None
        agent = Agent(
            key=secrets.token_hex(8),
            place=place,
            host=host,
            free_port=free_port,
            seen_at=asyncio.get_running_loop().time(),
        )
        self._places[place] = _Place(agent)
        log.info("the agent of rollout node %d has registered from %s", place, host)
        for server in self._servers:
            if place in server.places and server.back_off is None:
                self._begin(server)
        self._tell()
        return agent

    def hear(self, agent: Agent, reports: Sequence[Report]) -> list[Order]:
        """Take in an agent's reports; returns all that it is to run, and nothing else."""
        agent.seen_at = asyncio.get_running_loop().time()
        ours = [server for server in self._servers if agent.place in server.places]
        for report in reports:
            server = next((each for each in ours if each.runs and each.name == report.name), None)
            if server is None:
                continue
            if report.ended is not None:
                self._end(server, report.ended)
            elif server.url is None and report.url is not None:
                server.url, server.ready_at = report.url, agent.seen_at
                log.info("%s is ready at %s", server.name, report.url)
                self._tell()
        return [
            Order(
                name=server.name,
                index=server.index,
                node_rank=server.places.index(agent.place),
                init_address=server.init_address,
            )
            for server in ours
            if server.runs and not self.closing
        ]

    def lose(self, agent: Agent, reason: str) -> None:
        """Count an agent as gone, with the servers of its node."""
        if self._places[agent.place].agent is not agent:
            return
        self._places[agent.place] = _Place(hopeless=None if self.agents_return else reason)
        for server in self._servers:
            if agent.place in server.places and server.runs:
                self._end(server, reason)
        self._tell()

    def lose_silent_agents(self, silence_s: float) -> None:
        """Count agents as lost that were not heard of for so long."""
        for agent in self.agents:
            if agent.seen_at < asyncio.get_running_loop().time() - silence_s:
                self.lose(agent, f"the agent of rollout node {agent.place} was not heard of for {silence_s:g} s")

    def stop_hoping(self, reason: str) -> None:
        """No agent will register any more for the nodes without one."""
        for place in self._places:
            if place.agent is None:
                place.hopeless = place.hopeless or reason
        self._tell()

    async def wait_for_agents(self) -> None:
        """Wait until there is an agent."""
        while not self.agents:
            await self._changed.wait()

    async def wait_for_departures(self) -> None:
        """Wait until no agent is left."""
        while self.agents:
            await self._changed.wait()

    def _begin(self, server: _Server) -> None:
        """Order the next life, if all its nodes have agents."""
        server.back_off = None
        agents = [self._places[place].agent for place in server.places]
        first = agents[0]
        if server.runs or server.given_up is not None or self.closing or first is None or None in agents:
            return
        server.life += 1
        server.runs = True
        if len(agents) > 1:
            server.init_address = f"{first.host}:{first.free_port}"
        log.info("%s starts", server.name)

    def _end(self, server: _Server, reason: str) -> None:
        """End a life, and have the next one begin after a while, longer each time."""
        if self.closing:
            return
        now = asyncio.get_running_loop().time()
        was_sound = server.url is not None and now - server.ready_at >= SOUND_LIFE_S
        server.num_short_lives = 1 if was_sound else server.num_short_lives + 1
        server.runs, server.url = False, None
        if server.num_short_lives > self.max_restarts:
            server.given_up = f"{reason} (it was restarted {self.max_restarts} times)"
            log.error("%s: %s; the run goes on without this server", server.name, server.given_up)
        else:
            delay_s = min(FIRST_BACK_OFF_S * 2 ** (server.num_short_lives - 1), LONGEST_BACK_OFF_S)
            log.warning("%s: %s; it is restarted in %g s", server.name, reason, delay_s)
            server.back_off = asyncio.get_running_loop().call_later(delay_s, self._begin, server)
        self._tell()

    def _why_gone(self, server: _Server) -> str | None:
        """Why a server is not ready and will not be."""
        hopeless = (self._places[place].hopeless for place in server.places)
        return server.given_up or next((reason for reason in hopeless if reason is not None), None)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
