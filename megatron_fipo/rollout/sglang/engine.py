"""The engine over SGLang servers: every request has exactly one result, whatever becomes of the servers.

An attempt that fails, or whose answer cannot be used, is made again elsewhere. The servers themselves are kept by
`ServerFleet`.
"""

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, ServerAddress
from megatron_fipo.rollout.servers.registry import ServerPool
from megatron_fipo.rollout.sglang.client import ServerError, ServerSilentError, open_session
from megatron_fipo.rollout.sglang.generate_responses import ResponseError, RoutingShape, read_response, request_body
from megatron_fipo.rollout.sglang.request_router import RequestRouter
from megatron_fipo.rollout.sglang.server_choice import Flight, Server, Way, check_length, check_tokens, choose_server
from megatron_fipo.rollout.sglang.server_fleet import ServerFleet, back_off_s
from megatron_fipo.runtime.errors import RunError

MAX_RESULTS_WAITING = 64
"""Answers that are read or wait to be taken; further ones stay in the network."""

ABORT_INTERVAL_S = 1.0
"""An abort that overtakes its request is lost, so it is said again."""

NUM_PARSERS = 2
# Below this an answer is read at once: a thread takes longer to hear of it.
_LARGE_ANSWER_BYTES = 1 << 16


class SglangEngine:
    """A `ServedEngine`; use it in `async with`, in one event loop.

    Args:
        pool: Servers. The engine has them restarted, and leaves it to its owner to close the pool.
        config: Requests in flight, and how long and how often they are tried.
        vocabulary_size: Ids lie below it.
        routing: Experts of the model, where they are replayed.
        router: Where requests go first; without it, straight to a server.
    """

    def __init__(
        self,
        pool: ServerPool,
        config: RolloutConfig,
        vocabulary_size: int,
        routing: RoutingShape | None = None,
        router: RequestRouter | None = None,
    ) -> None:
        self._config, self._vocabulary_size = config, vocabulary_size
        self._routing, self._router = routing, router
        self._session = open_session(pool.api_key, config.max_requests_in_flight)
        self._parsers = ThreadPoolExecutor(NUM_PARSERS, thread_name_prefix="parser")
        self._flights: dict[str, Flight] = {}
        self._waiting: deque[Flight] = deque()
        self._homes: dict[str, str] = {}
        self._group_sizes: Counter[str] = Counter()
        self._results: deque[tuple[GenerationResult, bool]] = deque()
        self._slots = asyncio.Semaphore(MAX_RESULTS_WAITING)
        self._num_running = 0
        self._failure: BaseException | None = None
        # Set where there may be something to send, and where there may be something to take.
        self._work, self._news = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fleet = ServerFleet(
            pool,
            config.sglang,
            self._session,
            with_routing=routing is not None,
            start=self._start,
            move=self._move_flights,
            wake=self._work.set,
        )

    async def __aenter__(self) -> Self:
        self._start(self._fleet.follow_pool())
        self._start(self._dispatch())
        return self

    async def __aexit__(self, *exception: object) -> None:
        tasks = [*self._tasks, *(flight.task for flight in self._flights.values() if flight.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._parsers.shutdown(wait=True)
        # Servers notice within seconds that nobody waits for an answer, and end the request.
        await self._session.close()

    @property
    def servers(self) -> Sequence[ServerAddress]:
        """Servers that answer, those that wait for weights included, in an order that restarts do not change."""
        return self._fleet.addresses

    @property
    def next_change(self) -> asyncio.Event:
        """Is set as soon as `servers`, or those of the pool, are others than now; and when the engine fails."""
        return self._fleet.next_change

    def raise_failure(self) -> None:
        """Raise what has made the engine fail, if anything has."""
        if self._failure is not None:
            raise self._failure

    async def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests and return.

        Raises:
            RunError: A request would harm a server, or the engine has failed.
            ValueError: A request of that name is in flight.
        """
        self.raise_failure()
        for request in requests:
            check_tokens(request, self._vocabulary_size)
            if request.request_id in self._flights:
                raise ValueError(f"request {request.request_id} is in flight already")
            flight = Flight(request=request)
            self._flights[request.request_id] = flight
            self._group_sizes[request.prompt_id] += 1
            self._waiting.append(flight)
        self._work.set()

    async def stream(self) -> AsyncIterator[GenerationResult]:
        """Yield results in the order they finish; end when nothing is left in flight.

        Raises:
            RunError: No server is left, or a request failed as often as it may.
        """
        while True:
            self.raise_failure()
            if self._results:
                result, has_slot = self._results.popleft()
                if has_slot:
                    self._slots.release()
                yield result
            elif self._flights:
                self._news.clear()
                await self._news.wait()
            else:
                return

    async def abort(self, request_ids: Collection[str]) -> None:
        """End requests early; their results come with finish reason "abort" and what they have so far."""
        for request_id in request_ids:
            flight = self._flights.get(request_id)
            if flight is None or flight.is_aborted:
                continue
            flight.is_aborted = True
            if flight.way is None:
                self._end_empty(flight)
            else:
                self._start(self._abort_on_servers(flight))

    async def pause(self, mode: PauseMode) -> None:
        """Have every server stop where it is, so that its weights may change.

        With "abort", running requests end as by `abort`; with the others they go on after `resume`. What was not sent
        waits for `resume`.
        """
        self.raise_failure()
        await self._fleet.pause(mode)

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        """Go on with all servers that have a version; those that failed to take it in are restarted.

        A server without the version that did not fail (it has come since) waits for its weights.

        Args:
            policy_version: The version.
            failed: Names of servers that did not take it in.

        Raises:
            RunError: No server is left.
        """
        self.raise_failure()
        await self._fleet.resume(policy_version, failed)
        self.raise_failure()

    # Requests.

    def _move_flights(self, server: Server, reason: str, with_routed: bool) -> None:
        """Begin requests of a server again, and on request those that a router may have sent there."""
        flights = list(server.flights)
        if with_routed and self._router is not None:
            flights += [flight for flight in self._router.flights if server in flight.servers]
        for flight in flights:
            if flight.task is not None and flight.task is not asyncio.current_task():
                flight.task.cancel()
                self._land(flight)
                self._retry(flight, reason)

    async def _dispatch(self) -> None:
        """Send what waits, as far as servers and the bound on requests in flight allow."""
        while True:
            self._work.clear()
            while self._may_send():
                flight = self._waiting[0]
                if self._flights.get(flight.request.request_id) is not flight:
                    # It was aborted while it waited.
                    self._waiting.popleft()
                elif (way := self._way_for(flight)) is None:
                    # There is no deadline: the pool knows how long a server may take to come, probes end one that
                    # hangs, and one without weights has them once the trainer is done with what it does.
                    break
                else:
                    self._send(self._waiting.popleft(), way)
            await self._work.wait()

    def _may_send(self) -> bool:
        below_bound = self._num_running < self._config.max_requests_in_flight
        return bool(self._waiting) and self._fleet.is_running.is_set() and below_bound

    def _way_for(self, flight: Flight) -> Way | None:
        serving = self._fleet.serving
        if self._router is not None and not flight.failures and self._router.reaches(serving):
            return self._router
        home = self._homes.get(flight.request.prompt_id)
        return choose_server(serving, home, flight.tried, self._config.group_size)

    def _send(self, flight: Flight, way: Way) -> None:
        check_length(flight.request, way.servers)
        # Of one length and random, so that no name begins with another: aborts go by how a name begins.
        flight.rid, flight.way, flight.servers = uuid.uuid4().hex, way, way.servers
        flight.first_version = self._fleet.policy_version
        way.flights.add(flight)
        self._num_running += 1
        self._homes[flight.request.prompt_id] = way.name
        flight.task = asyncio.create_task(self._run(flight, way))

    async def _run(self, flight: Flight, way: Way) -> None:
        """One attempt."""
        has_slot = False

        async def take_slot() -> None:
            nonlocal has_slot
            await self._slots.acquire()
            has_slot = True

        request, rid = flight.request, flight.rid
        try:
            is_deterministic = all(server.info.is_deterministic for server in flight.servers)
            body = request_body(request, rid, flight.first_version, is_deterministic)
            answer = await way.generate(flight, body, self._config.sglang.request_timeout_s, take_slot)
            result = await self._read(answer, request, rid)
            await self._check_version(result, flight)
            self._land(flight)
            self._deliver(flight, result, has_slot)
            has_slot = False
            if isinstance(way, Server):
                way.failures_in_a_row = 0
        except (ServerError, ResponseError) as error:
            if isinstance(error, ServerSilentError):
                self._start(self._abort_attempt(flight.servers, rid))
            self._land(flight)
            self._retry(flight, f"{way.client.url}: {error}", way)
            if isinstance(way, Server):
                self._fleet.blame(way, error)
        except Exception as error:
            self._fail(error)
        finally:
            if has_slot:
                self._slots.release()

    async def _read(self, answer: bytes, request: GenerationRequest, rid: str) -> GenerationResult:
        arguments = answer, request, rid, self._vocabulary_size, self._routing
        if len(answer) < _LARGE_ANSWER_BYTES:
            return read_response(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._parsers, read_response, *arguments)

    async def _check_version(self, result: GenerationResult, flight: Flight) -> None:
        """Refuse tokens of other weights than its servers had between question and answer.

        While the engine is paused a server may have newer weights already, and go on so that they can be verified.
        What it finishes with them waits until the engine goes on, or is sent again where the server is given up.

        Raises:
            ResponseError: Some are.
        """
        if not len(result.token_ids):
            return
        versions = result.policy_versions if result.policy_versions is not None else np.array([result.policy_version])
        if versions.max() > max(server.policy_version for server in flight.servers):
            await self._fleet.is_running.wait()
        first, last = flight.first_version, max(server.policy_version for server in flight.servers)
        if versions.min() < first or versions.max() > last:
            told = sorted(set(versions.tolist()))
            raise ResponseError("version", f"tokens of policy versions {told}, where {first} to {last} are due")

    def _land(self, flight: Flight) -> None:
        """Take a request off its way."""
        assert flight.way is not None
        flight.way.flights.discard(flight)
        flight.way, flight.task = None, None
        self._num_running -= 1
        self._work.set()

    def _retry(self, flight: Flight, problem: str, way: Way | None = None) -> None:
        """Queue a request again after a while, in front of those that were never sent."""
        flight.failures.append(problem)
        if way is not None:
            flight.tried.add(way.name)
        if flight.is_aborted:
            self._end_empty(flight)
        elif len(flight.failures) >= self._config.sglang.max_attempts:
            told = "; ".join(f"({number}) {failure}" for number, failure in enumerate(flight.failures, 1))
            self._fail(
                RunError(
                    f"request {flight.request.request_id} failed {len(flight.failures)} times "
                    f"(rollout.sglang.max_attempts): {told}"
                )
            )
        else:
            self._start(self._queue_later(flight, back_off_s(len(flight.failures))))

    async def _queue_later(self, flight: Flight, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if self._flights.get(flight.request.request_id) is flight:
            self._waiting.appendleft(flight)
            self._work.set()

    async def _abort_on_servers(self, flight: Flight) -> None:
        """Have those servers that may have a request end it, until its answer is there."""
        while flight.way is not None:
            await self._abort_attempt(flight.servers, flight.rid)
            if flight.task is not None:
                await asyncio.wait([flight.task], timeout=ABORT_INTERVAL_S)

    async def _abort_attempt(self, servers: Iterable[Server], rid: str) -> None:
        there = [server for server in servers if self._fleet.has(server)]
        await asyncio.gather(*(self._abort_on_server(server, rid) for server in there))

    async def _abort_on_server(self, server: Server, rid: str) -> None:
        try:
            await server.client.abort_request(rid)
        except ServerError:
            server.suspected.set()

    def _end_empty(self, flight: Flight) -> None:
        """The result of a request that is aborted before it has tokens."""
        result = GenerationResult(
            request_id=flight.request.request_id,
            token_ids=np.empty(0, dtype=np.int32),
            log_probs=np.empty(0, dtype=np.float32),
            finish_reason="abort",
            policy_version=self._fleet.policy_version,
        )
        self._deliver(flight, result, has_slot=False)

    def _deliver(self, flight: Flight, result: GenerationResult, has_slot: bool) -> None:
        """Hand over a request's one result."""
        request = flight.request
        del self._flights[request.request_id]
        self._group_sizes[request.prompt_id] -= 1
        if not self._group_sizes[request.prompt_id]:
            del self._group_sizes[request.prompt_id]
            self._homes.pop(request.prompt_id, None)
        self._results.append((result, has_slot))
        self._news.set()

    # Its own tasks.

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Let `stream` raise an error, and send nothing more."""
        self._failure = self._failure or error
        self._news.set()
        self._fleet.halt()
