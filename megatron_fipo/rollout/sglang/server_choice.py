"""Which request goes to which server: what is known of each, what a server cannot take, and the choice."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_fipo.rollout.engine import GenerationRequest, ServerAddress
from megatron_fipo.rollout.servers.registry import ServerLife
from megatron_fipo.rollout.sglang.client import FOLDER_VERSION, ServerInfo, SglangServer
from megatron_fipo.rollout.sglang.generate_responses import input_token_ids, num_begun
from megatron_fipo.runtime.errors import RunError


@dataclass(slots=True, kw_only=True, eq=False)
class Server:
    """A server as the engine knows it.

    Attributes:
        life: Its name and address.
        client: Speaks to it.
        info: What it told of itself.
        policy_version: Version that it was seen to have; `FOLDER_VERSION` where it must not serve.
        suspected: Set while a request failed there and it has not shown its health since.
        failures_in_a_row: Requests that failed there since one succeeded.
        flights: Requests that it works on.
    """

    life: ServerLife
    client: SglangServer
    info: ServerInfo
    policy_version: int = FOLDER_VERSION
    suspected: asyncio.Event = field(default_factory=asyncio.Event)
    failures_in_a_row: int = 0
    flights: set["Flight"] = field(default_factory=set)

    @property
    def name(self) -> str:
        """See `Way`."""
        return self.life.name

    @property
    def servers(self) -> tuple["Server", ...]:
        """See `Way`."""
        return (self,)

    async def generate(
        self, flight: "Flight", body: bytes, timeout_s: float, before_reading: Callable[[], Awaitable[object]]
    ) -> bytes:
        """See `Way`."""
        return await self.client.generate(body, timeout_s, before_reading)

    @property
    def address(self) -> ServerAddress:
        """It as weight synchronisation knows it."""
        return ServerAddress(
            name=self.life.name,
            url=self.life.url,
            tensor_parallel_size=self.life.tensor_parallel_size,
            policy_version=self.policy_version,
        )


class Way(Protocol):
    """Where an attempt goes: to a server, or to one of several that a router chooses."""

    client: SglangServer
    flights: set["Flight"]

    @property
    def name(self) -> str:
        """What it is called; no two have one name."""
        ...

    @property
    def servers(self) -> tuple[Server, ...]:
        """Servers that an attempt may come to."""
        ...

    async def generate(
        self, flight: "Flight", body: bytes, timeout_s: float, before_reading: Callable[[], Awaitable[object]]
    ) -> bytes:
        """Send an attempt, and give its answer as it came; see `SglangServer.generate`."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """A request from `submit` until its one result is there.

    Attributes:
        request: The request.
        failures: What became of its attempts, one text each.
        tried: Names of the servers where one failed.
        is_aborted: Whether it is to end early.
        rid: Name of its last attempt.
        way: Where that was sent; None while it waits.
        servers: Those of which one has it.
        first_version: Version of those when it was sent.
        task: Its running attempt.
    """

    request: GenerationRequest
    failures: list[str] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    is_aborted: bool = False
    rid: str = ""
    way: Way | None = None
    servers: tuple[Server, ...] = ()
    first_version: int = FOLDER_VERSION
    task: "asyncio.Task[None] | None" = None


def check_tokens(request: GenerationRequest, vocabulary_size: int) -> None:
    """Refuse what would harm a server: an id outside of the vocabulary ends it.

    Raises:
        RunError: There is such an id, no prompt, or nothing to generate.
    """
    ids = input_token_ids(request)
    where = f"request {request.request_id}"
    if not len(request.prompt_token_ids):
        raise RunError(f"{where}: its prompt has no tokens; leave such prompts out of the data")
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        wrong = int(ids[(ids < 0) | (ids >= vocabulary_size)][0])
        raise RunError(
            f"{where}: token id {wrong} is outside of the model's vocabulary of {vocabulary_size}; "
            "the tokenizer is not this model's"
        )
    if num_begun(request) >= request.sampling.max_tokens:
        raise RunError(f"{where}: {num_begun(request)} of {request.sampling.max_tokens} tokens are there already")


def check_length(request: GenerationRequest, servers: Iterable[Server]) -> None:
    """Refuse what one of the servers would cut.

    Raises:
        RunError: Prompt and longest response do not fit.
    """
    longest = len(request.prompt_token_ids) + request.sampling.max_tokens
    server = min(servers, key=lambda server: server.info.max_sequence_tokens)
    if longest > server.info.max_sequence_tokens:
        raise RunError(
            f"request {request.request_id}: a prompt of {len(request.prompt_token_ids)} and a response of up to "
            f"{request.sampling.max_tokens} tokens are longer than the {server.info.max_sequence_tokens} that "
            f"{server.life.url} takes; lower rollout.max_response_tokens, leave long prompts out, or raise "
            "context_length and max_total_tokens in rollout.sglang.server_arguments"
        )


def choose_server(servers: Iterable[Server], home: str | None, tried: Collection[str], slack: int) -> Server | None:
    """The server for a request: that of its group while its load allows, else the one with the fewest requests.

    A group's samples share their prompt's KV cache where they run on one server.

    Args:
        servers: Those that may serve.
        home: Name of the server of the request's group, if it has one.
        tried: Servers where this request has failed; another one is preferred.
        slack: Requests that the group's server may have more than the least loaded one.

    Returns:
        A server; None where none may serve.
    """
    candidates: Sequence[Server] = [server for server in servers if not server.suspected.is_set()]
    candidates = [server for server in candidates if server.life.name not in tried] or candidates
    if not candidates:
        return None
    least = min(candidates, key=lambda server: len(server.flights))
    for server in candidates:
        if server.life.name == home and len(server.flights) <= len(least.flights) + slack:
            return server
    return least
