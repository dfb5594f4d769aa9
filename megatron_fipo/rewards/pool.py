"""Grades responses in processes that can be killed.

A model's answer can keep a parser busy for ever, inside C code that no timeout reaches, or eat all memory. So grading
happens in child processes with a deadline. They are started by plain exec, never by a bare fork: this one holds
threads, CUDA and process groups.

The pool does its work in a thread of its own, so that it goes on while the caller's thread decodes; `score` awaits it
from any event loop, `submit` gives a future to wait for without one.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.reward import OverlongTerm, PythonTerm, RewardConfig
from megatron_fipo.rewards.base import Response, RewardError
from megatron_fipo.rewards.grader import FailureKind, describe_terms
from megatron_fipo.rewards.literals import as_literal
from megatron_fipo.rewards.process import Doing, GradingProcess, ProcessEndedError
from megatron_fipo.runtime.errors import RunError

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""What a process may be late beyond a time limit."""
PATIENCE = 10
"""A built-in term keeps its limit of processor time by itself; where it cannot, or has no processor, it is ended after
so many times as long."""
MAX_BATCH = 32
"""Jobs sent to a process at once."""
MAX_BATCH_CHARACTERS = 2_000_000
"""A batch is closed once its responses have so many."""
JOBS_PER_WORKER = 16
"""One more process is started for each so many jobs that wait."""
MAX_DEATHS = 2
"""So many processes may die with a job unanswered before it is at fault."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """A response to be scored.

    Attributes:
        sample_id: `prompt_id#index`, for messages.
        response: The response.
    """

    sample_id: str
    response: Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The reward of a response.

    Attributes:
        score: The first term's score, without its weight: the raw verdict.
        reward: Sum of the terms.
        terms: Every term's weighted score.
        answer: The answer that the first term judged.
        timed_out: A built-in term gave the answer up for its time or memory; it counts as wrong.
    """

    score: float
    reward: float
    terms: dict[str, float]
    answer: str | None
    timed_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFailure:
    """A response without a reward.

    Attributes:
        sample_id: The job's.
        kind: "reference" (a defect of the data row), "raised", "not_finite", or "ended" (it hung, or its process died).
        term: The term that failed.
        problem: What happened.
    """

    sample_id: str
    kind: FailureKind
    term: str
    problem: str


Outcome = Score | ScoreFailure | bool


class _Submission:
    """Jobs that were handed in together."""

    def __init__(self, size: int) -> None:
        self.future: Future[list[Any]] = Future()
        self._outcomes: list[Any] = [None] * size
        self._missing = size
        self._finish()

    def settle(self, place: int, outcome: Outcome) -> None:
        self._outcomes[place] = outcome
        self._missing -= 1
        self._finish()

    def fail(self, error: BaseException) -> None:
        # A caller that was cancelled has cancelled its future too.
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def _finish(self) -> None:
        if not self._missing:
            with contextlib.suppress(InvalidStateError):
                self.future.set_result(self._outcomes)


@dataclass(slots=True)
class _Job:
    """A job on its way.

    Attributes:
        message: What a process is sent.
        sample_id: Its name, where it has one.
        submission: Where its outcome belongs, at `place`.
        deaths: Processes that died while it was their next job.
    """

    message: dict[str, Any]
    sample_id: str
    submission: _Submission
    place: int
    deaths: int = 0

    def settle(self, outcome: Outcome) -> None:
        self.submission.settle(self.place, outcome)


@dataclass(slots=True)
class _State:
    """What the pool's thread works on; touched by that thread alone.

    Attributes:
        queue: Jobs that no process has.
        news: Set when a job comes.
        tasks: One for each process.
    """

    queue: deque[_Job] = field(default_factory=deque)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class RewardPool:
    """Scores responses in grading processes.

    The first process is started at once, which checks the terms; more of them follow as jobs wait, up to
    `reward.max_workers`. A process that ends before its time is replaced, and costs at most the response it was busy
    with: a built-in term that hangs on an answer finds it wrong, a python function that hangs has failed.

    Args:
        config: The reward.
        max_response_tokens: Longest response, in tokens.

    Attributes:
        num_replaced: Processes that were replaced so far.

    Raises:
        ConfigError: A term cannot be used.
        RunError: The first process did not start.
    """

    def __init__(self, config: RewardConfig, max_response_tokens: int) -> None:
        config.check_response_limit(max_response_tokens)
        self.num_replaced = 0
        self._config = config
        self._settings = {
            "terms": describe_terms(config),
            "require_stop": config.require_stop,
            "timeout_s": config.timeout_s,
            "max_response_tokens": max_response_tokens,
            "memory_bytes": int(config.worker_memory_gib * 1024**3),
        }
        kinds = {term.type for term in config.terms.values()}
        self._sends_prompt, self._sends_metadata = "python" in kinds, bool(kinds & {"python", "reasoning_gym"})
        self._first_graded = next(name for name, term in config.terms.items() if not isinstance(term, OverlongTerm))
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._state = _State()
        # A thread that stays, since the kernel ends a process with the thread that started it.
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-pool", daemon=True)
        self._thread.start()
        try:
            first = asyncio.run_coroutine_threadsafe(GradingProcess.start(self._settings), self._loop).result()
        except BaseException:
            self.close()
            raise
        self._loop.call_soon_threadsafe(self._add_task, first)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Score | ScoreFailure]:
        """Score responses; outcomes in the order of the jobs.

        Raises:
            RunError: Grading processes cannot be started any more, or the pool was closed.
        """
        return await asyncio.wrap_future(self.submit(jobs))

    def submit(self, jobs: Sequence[ScoreJob]) -> Future[list[Score | ScoreFailure]]:
        """Hand in responses and go on; the future gives what `score` gives.

        Raises:
            RewardError: A prompt's metadata cannot be sent to another process.
            RunError: The pool was closed.
        """
        return self._hand_in([self._message(job) for job in jobs], [job.sample_id for job in jobs])

    async def same_answer(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether answers are the same in the eyes of the first term, such as 1/2 and 0.5 to a math term.

        Equal texts are; two answers that take too long to compare are not.
        """
        open_places = [place for place, (first, second) in enumerate(pairs) if first != second]
        messages = [{"pair": list(pairs[place])} for place in open_places]
        found = await asyncio.wrap_future(self._hand_in(messages, [""] * len(messages)))
        same = [True] * len(pairs)
        for place, answer in zip(open_places, found, strict=True):
            same[place] = bool(answer)
        return same

    def close(self) -> None:
        """End all processes and the thread; whoever still waits for an outcome gets an error. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _message(self, job: ScoreJob) -> dict[str, Any]:
        response, metadata = job.response, "{}"
        if self._sends_metadata:
            try:
                metadata = repr(as_literal(dict(response.metadata)))
            except TypeError as error:
                raise RewardError(job.sample_id, str(error)) from error
        return {
            "text": response.text,
            "finish_reason": response.finish_reason,
            "num_tokens": response.num_tokens,
            "prompt": response.prompt if self._sends_prompt else "",
            "reference": response.reference,
            "metadata": metadata,
            "given_up": [],
        }

    def _hand_in(self, messages: Sequence[dict[str, Any]], sample_ids: Sequence[str]) -> Future[list[Any]]:
        submission = _Submission(len(messages))
        jobs = [
            _Job(message, sample_id, submission, place)
            for place, (message, sample_id) in enumerate(zip(messages, sample_ids, strict=True))
        ]
        with self._lock:
            if self._closed:
                raise RunError("the reward pool is closed")
            if jobs:
                asyncio.run_coroutine_threadsafe(self._enqueue(jobs), self._loop)
        return submission.future

    # Everything below runs in the pool's thread.

    async def _enqueue(self, jobs: list[_Job]) -> None:
        state = self._state
        state.queue.extend(jobs)
        wanted = min(-(-len(state.queue) // JOBS_PER_WORKER), self._config.max_workers)
        for _ in range(wanted - len(state.tasks)):
            self._add_task(None)
        async with state.news:
            state.news.notify_all()

    def _add_task(self, worker: GradingProcess | None) -> None:
        task = self._loop.create_task(self._work(worker))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    async def _work(self, worker: GradingProcess | None) -> None:
        """Keep one process busy; start it anew when it ends."""
        batch: deque[_Job] = deque()
        try:
            while True:
                if worker is None:
                    worker = await GradingProcess.start(self._settings)
                await self._take_batch(batch)
                try:
                    await self._grade(worker, batch)
                except ProcessEndedError as error:
                    await worker.end()
                    self._put_back(batch, worker, error)
                    worker = None
                    self.num_replaced += 1
        except asyncio.CancelledError:
            self._fail(batch, RunError("the reward pool was closed"))
            raise
        except (ConfigError, OSError) as error:
            # What the first process could do, a later one cannot: no longer a matter of the configuration.
            self._give_up(batch, RunError(f"a grading process could not be started: {error}"))
        except Exception as error:
            # Whatever it was, nobody may wait for ever.
            self._give_up(batch, error)
        finally:
            if worker is not None:
                await worker.end()

    async def _take_batch(self, batch: deque[_Job]) -> None:
        state = self._state
        async with state.news:
            await state.news.wait_for(lambda: bool(state.queue))
        share = -(-len(state.queue) // len(state.tasks))
        characters = 0
        while state.queue and len(batch) < min(share, MAX_BATCH) and characters < MAX_BATCH_CHARACTERS:
            batch.append(state.queue.popleft())
            characters += len(batch[-1].message.get("text", ""))

    async def _grade(self, worker: GradingProcess, batch: deque[_Job]) -> None:
        """Send the batch and settle its jobs one by one; those that are left had no answer."""
        if not worker.is_running:
            raise ProcessEndedError(idle=True)
        await worker.send([job.message for job in batch], self._patience_s(None))
        while batch:
            reply = await worker.receive(self._patience_s)
            job = batch.popleft()
            if "same" in reply:
                job.settle(reply["same"])
            elif "failure" in reply:
                job.settle(
                    ScoreFailure(
                        sample_id=job.sample_id, kind=reply["failure"], term=reply["term"], problem=reply["problem"]
                    )
                )
            else:
                job.settle(Score(**reply))

    def _patience_s(self, doing: Doing) -> float:
        if doing is not None and isinstance(self._config.terms[doing[1]], PythonTerm):
            return self._config.timeout_s + GRACE_S
        return PATIENCE * self._config.timeout_s + GRACE_S

    def _put_back(self, batch: deque[_Job], worker: GradingProcess, end: ProcessEndedError) -> None:
        """Put the jobs of an ended process back in front; the one it was busy with may be settled instead."""
        culprit = batch[0]
        culprit.deaths += not end.idle
        if end.hung or culprit.deaths >= MAX_DEATHS:
            seconds = self._patience_s(worker.doing) - GRACE_S
            problem = f"over {seconds:g} s" if end.hung else f"{MAX_DEATHS} grading processes died of it"
            outcome = self._convict(culprit, worker.doing, problem)
            if outcome is not None:
                batch.popleft().settle(outcome)
        self._state.queue.extendleft(reversed(batch))
        batch.clear()

    def _convict(self, job: _Job, doing: Doing, problem: str) -> Outcome | None:
        """The outcome of a job that processes ended on; None: it is graded again, without the term it was in."""
        kind, term = doing or ("term", self._first_graded)
        if "pair" in job.message:
            return False
        if kind == "reference":
            problem = f"reading the reference answer: {problem}"
            return ScoreFailure(sample_id=job.sample_id, kind="reference", term=term, problem=problem)
        if isinstance(self._config.terms[term], PythonTerm):
            return ScoreFailure(sample_id=job.sample_id, kind="ended", term=term, problem=problem)
        job.message["given_up"].append(term)
        job.deaths = 0
        return None

    def _give_up(self, batch: deque[_Job], error: Exception) -> None:
        """End a task: its jobs fail, and those that wait too if there is no other process to grade them."""
        self._fail(batch, error)
        if len(self._state.tasks) > 1:
            logger.warning("%d grading processes go on without one: %s", len(self._state.tasks) - 1, error)
        else:
            self._fail(self._state.queue, error)

    def _fail(self, jobs: deque[_Job], error: Exception) -> None:
        while jobs:
            jobs.popleft().submission.fail(error)

    async def _end(self) -> None:
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail(self._state.queue, RunError("the reward pool was closed"))
