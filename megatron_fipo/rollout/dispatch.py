"""Requests at a served engine: how many at once, what becomes of interrupted ones, and who waits for which."""

import asyncio
import contextlib
import heapq
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, ServedEngine
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import ExpertArray

CLOSING_PATIENCE_S = 10.0
"""So long `close` waits for aborted requests to come back."""


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request that somebody waits for.

    Attributes:
        request: As it was asked for.
        order: Of those that wait, evaluation's before training's, the smallest goes first.
        begins: Called with the version of the weights each time that it begins from its prompt.
        done: Its result.
        is_evaluation: It must be of one version, the current one.
        parts: What interruptions left, in order.
        attempts: Times it came back interrupted with nobody having asked for that.
        num_pauses: Pauses before it was sent.
    """

    request: GenerationRequest
    order: tuple[int, int]
    begins: Callable[[int], None]
    done: asyncio.Future[GenerationResult]
    is_evaluation: bool
    parts: list[GenerationResult] = field(default_factory=list)
    attempts: int = 0
    num_pauses: int = 0


class Dispatcher:
    """Sends requests to a served engine, oldest first, and waits for their results.

    A request that comes back interrupted is sent again: from its tokens with `rollout.partial_rollouts`, else from the
    start. Nothing is sent while the engine is paused, while `rollout.max_requests_in_flight` are unanswered, or while
    so many responses wait for their score; and nothing of training while something of evaluation waits to be sent.

    Args:
        engine: The engine.
        config: Bounds.
        backlog: How many responses wait for their score; `poke` tells when that has become less.

    Attributes:
        policy_version: Version of the servers' weights; None before anybody has said.
        paused: Whether the engine is.
        num_interrupted: Requests that came back interrupted, since the last `counters`.
        num_discarded_tokens: Tokens of theirs, and of those given up, that nobody uses; since then too.
    """

    def __init__(self, engine: ServedEngine, config: RolloutConfig, backlog: Callable[[], int]) -> None:
        self._engine, self._config, self._backlog = engine, config, backlog
        self.policy_version: int | None = None
        self.paused = False
        self.num_interrupted = self.num_discarded_tokens = 0
        self._open: dict[str, _Open] = {}
        self._queue: list[tuple[bool, tuple[int, int], str]] = []
        self._in_flight: set[str] = set()
        self._given: set[str] = set()
        self._given_up: set[str] = set()
        self._to_abort: list[str] = []
        self._num_results = self._num_pauses = 0
        self._failure: BaseException | None = None
        self._news, self._results_due = asyncio.Event(), asyncio.Event()
        self._result_came = asyncio.Event()
        self._engine_lock = asyncio.Lock()
        self._sender: asyncio.Task[None] | None = None
        self._receiver: asyncio.Task[None] | None = None

    @property
    def depths(self) -> dict[str, int]:
        """How much waits for what, for people."""
        return {
            "requests to be sent": len(self._open.keys() - self._in_flight),
            "requests in flight": len(self._in_flight),
            "responses to be scored": self._backlog(),
        }

    async def generate(
        self,
        request: GenerationRequest,
        order: tuple[int, int],
        begins: Callable[[int], None] = lambda version: None,
        is_evaluation: bool = False,
        begun: GenerationResult | None = None,
    ) -> GenerationResult:
        """Have a request answered, however often it takes; whoever stops to wait gives it up.

        Args:
            request: The request; no other one of its name may be open.
            order: The smallest goes first.
            begins: Called with the version of the weights each time that it begins from its prompt.
            is_evaluation: It goes before training's, and its result is of the current version alone.
            begun: What an earlier run had of it, all or the beginning. A beginning is used with
                `rollout.partial_rollouts` alone.

        Raises:
            RunError: The engine failed.
        """
        if self._failure is not None:
            raise self._failure
        self._start()
        if begun is not None and begun.finish_reason != "abort":
            return begun
        name = request.request_id
        assert name not in self._open and name not in self._in_flight, name
        done = asyncio.get_running_loop().create_future()
        entry = _Open(request=request, order=order, begins=begins, done=done, is_evaluation=is_evaluation)
        if begun is not None and self._config.partial_rollouts and len(begun.token_ids):
            entry.parts.append(begun)
        self._open[name] = entry
        self._enqueue(name)
        try:
            return await done
        finally:
            del self._open[name]
            if name in self._in_flight:
                self._given_up.add(name)
                self._to_abort.append(name)
            self.num_discarded_tokens += 0 if done.done() and not done.cancelled() else _num_tokens(entry.parts)
            self._news.set()

    def so_far(self, name: str) -> GenerationResult | None:
        """What there is here of an open request's response; what its server holds is not."""
        entry = self._open.get(name)
        if entry is None:
            return None
        if entry.done.done() and not entry.done.cancelled() and entry.done.exception() is None:
            return entry.done.result()
        return _joined(entry.parts, entry.request) if entry.parts else None

    def poke(self) -> None:
        """Look again whether something can be sent."""
        self._news.set()

    async def pause(self, mode: PauseMode) -> None:
        """Send nothing more, and have the engine pause."""
        self.paused = True
        async with self._engine_lock:
            self._num_pauses += 1
            await self._engine.pause(mode)

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        """Have the engine go on with a version, and send again."""
        async with self._engine_lock:
            await self._engine.resume(policy_version, failed)
            self.policy_version = policy_version
            self.paused = False
        self._news.set()

    def counters(self) -> dict[str, int]:
        """What has been counted since the last call, as metrics."""
        counted = {
            "rollout/requests_interrupted": self.num_interrupted,
            "rollout/response_tokens_discarded": self.num_discarded_tokens,
        }
        self.num_interrupted = self.num_discarded_tokens = 0
        return counted

    async def close(self) -> None:
        """Abort what is in flight, wait for it to come back, and send and take nothing more."""
        self._fail(RunError("the rollout controller was closed"))
        if self._sender is None or self._receiver is None:
            return
        await _end(self._sender)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_PATIENCE_S):
                await self._drain(self._receiver)
        await _end(self._receiver)

    async def _drain(self, receiver: asyncio.Task[None]) -> None:
        if self._in_flight:
            await self._engine.abort(list(self._in_flight))
        while self._in_flight and not receiver.done():
            self._result_came.clear()
            await self._result_came.wait()

    def _start(self) -> None:
        if self._sender is None:
            self._sender = asyncio.create_task(self._guard(self._send()))
            self._receiver = asyncio.create_task(self._guard(self._receive()))

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._fail(error)
            self._result_came.set()

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits, and who will."""
        self._failure = self._failure or error
        for entry in self._open.values():
            if not entry.done.done():
                entry.done.set_exception(self._failure)

    def _enqueue(self, name: str) -> None:
        entry = self._open[name]
        heapq.heappush(self._queue, (not entry.is_evaluation, entry.order, name))
        self._news.set()

    async def _send(self) -> None:
        while True:
            await self._news.wait()
            async with self._engine_lock:
                self._news.clear()
                requests = [] if self.paused else self._next_requests()
                names = [request.request_id for request in requests]
                if requests:
                    await self._engine.submit(requests)
                    self._given.update(names)
                    self._results_due.set()
                aborted, self._to_abort = self._to_abort, []
                aborted = [name for name in aborted if name in self._in_flight]
                if aborted:
                    await self._engine.abort(aborted)

    def _next_requests(self) -> list[GenerationRequest]:
        """What may be sent now; it counts as in flight from here on."""
        requests = []
        while self._queue and len(self._in_flight) < self._config.max_requests_in_flight:
            if self._backlog() >= self._config.max_requests_in_flight:
                break
            *_, name = self._queue[0]
            entry = self._open.get(name)
            if entry is None or entry.done.done() or name in self._in_flight:
                heapq.heappop(self._queue)
                continue
            heapq.heappop(self._queue)
            self._in_flight.add(name)
            entry.num_pauses = self._num_pauses
            if not entry.parts:
                entry.begins(self.policy_version or 0)
            requests.append(_continued(entry))
        return requests

    async def _receive(self) -> None:
        while True:
            self._results_due.clear()
            if not self._given:
                await self._results_due.wait()
            given, num_results = set(self._given), self._num_results
            async for result in self._engine.stream():
                self._take(result)
            if self._num_results == num_results and given <= self._given:
                raise RuntimeError(f"the engine lost {len(given)} requests, {min(given)} first")

    def _take(self, result: GenerationResult) -> None:
        name = result.request_id
        if name not in self._in_flight:
            raise RuntimeError(f"the engine gave a result for {name}, which was not asked for")
        self._num_results += 1
        self._in_flight.discard(name)
        self._given.discard(name)
        self._result_came.set()
        self._news.set()
        if name in self._given_up:
            self._given_up.discard(name)
            self.num_discarded_tokens += len(result.token_ids)
            return
        entry = self._open[name]
        if entry.done.done():
            return
        whole = _joined([*entry.parts, result], entry.request)
        if result.finish_reason == "abort" and (whole.finish_reason == "abort" or entry.is_evaluation):
            self._interrupt(entry, result)
        elif entry.is_evaluation and self.policy_version is not None and not _is_of(whole, self.policy_version):
            self._interrupt(entry, result)
        else:
            entry.done.set_result(whole)

    def _interrupt(self, entry: _Open, result: GenerationResult) -> None:
        """Send a request again; what it has is kept or thrown away."""
        self.num_interrupted += 1
        if self._num_pauses == entry.num_pauses:
            entry.attempts += 1
            if entry.attempts >= self._config.sglang.max_attempts:
                raise RunError(
                    f"request {result.request_id} was broken off {entry.attempts} times by the servers "
                    "(rollout.sglang.max_attempts); see their logs"
                )
        if self._config.partial_rollouts and not entry.is_evaluation:
            if len(result.token_ids):
                entry.parts.append(result)
        else:
            self.num_discarded_tokens += len(result.token_ids)
        self._enqueue(result.request_id)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _num_tokens(parts: Collection[GenerationResult]) -> int:
    return sum(len(part.token_ids) for part in parts)


def _continued(entry: _Open) -> GenerationRequest:
    """The request, from where it stands."""
    if not entry.parts:
        return entry.request
    return replace(entry.request, begun_token_ids=np.concatenate([part.token_ids for part in entry.parts]))


def _joined(parts: list[GenerationResult], request: GenerationRequest) -> GenerationResult:
    """One result of all parts of a response; an interrupted one that had come to its end is finished."""
    if len(parts) == 1 and parts[0].finish_reason != "abort":
        return parts[0]
    last = parts[-1]
    token_ids = np.concatenate([part.token_ids for part in parts])
    reason = last.finish_reason
    if reason == "abort" and len(token_ids):
        if int(token_ids[-1]) in request.sampling.stop_token_ids:
            reason = "stop"
        elif len(token_ids) >= request.sampling.max_tokens:
            reason = "length"
    versions = [
        np.full(len(part.token_ids), part.policy_version, dtype=np.int32)
        if part.policy_versions is None
        else part.policy_versions
        for part in parts
    ]
    return GenerationResult(
        request_id=last.request_id,
        token_ids=token_ids,
        log_probs=np.concatenate([part.log_probs for part in parts]),
        finish_reason=reason,
        policy_version=parts[0].policy_version,
        policy_versions=np.concatenate(versions),
        routed_experts=_joined_experts(parts, len(request.prompt_token_ids)),
    )


def _joined_experts(parts: list[GenerationResult], prompt_length: int) -> ExpertArray | None:
    """Experts of each position as the part chose them that sampled the token after it; −1 where a part told none."""
    shapes = {part.routed_experts.shape[1:] for part in parts if part.routed_experts is not None}
    if not shapes:
        return None
    pieces, first, end = [], 0, prompt_length - 1
    for part in parts:
        end += len(part.token_ids)
        if part.routed_experts is None:
            pieces.append(np.full((end - first, *next(iter(shapes))), -1, dtype=np.int16))
        else:
            pieces.append(part.routed_experts[first:end])
        first = end
    return np.concatenate(pieces)


def _is_of(result: GenerationResult, policy_version: int) -> bool:
    """Whether all of a result is of one version."""
    versions = result.policy_versions
    return result.policy_version == policy_version and (versions is None or bool((versions == policy_version).all()))
