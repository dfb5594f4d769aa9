"""Served rollouts in simulated time: an event loop whose clock jumps, servers, a grader, prompts and a trainer.

Nothing here waits for real, and nothing depends on how busy the machine is.
"""

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_fipo.config.baselines import DapoConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.data.stream import EndOfPrompts
from megatron_fipo.rewards.pool import Score, ScoreFailure, ScoreJob
from megatron_fipo.rollout.batch_recipe import BatchRecipe, CollectedGroups
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters, ServerAddress
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.types import Prompt, RolloutGroup

TOKENS_PER_S = 10.0
MAX_TOKENS = 1000
SAMPLING = SamplingParameters(temperature=1.0, top_p=1.0, max_tokens=MAX_TOKENS, stop_token_ids=(MAX_TOKENS,))


class _Clock(selectors.SelectSelector):
    """Waits for nothing: time is what somebody would have waited for."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everybody waits for somebody else")
            self.now += max(timeout, 0.0)
        return ready


class SimulatedTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in simulated time; what is handed to another thread is done at once."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def simulate[T](work: Coroutine[Any, Any, T]) -> T:
    """Run to the end in simulated time, from 0."""
    with asyncio.Runner(loop_factory=SimulatedTimeLoop) as runner:
        return runner.run(work)


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class _Running:
    """A request on a server: tokens of earlier versions, and since when it has been at the current one."""

    request: GenerationRequest
    length: int
    versions: list[int] = field(default_factory=list)
    since: float | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def begun(self) -> int:
        return 0 if self.request.begun_token_ids is None else len(self.request.begun_token_ids)


class SimulatedEngine:
    """Servers without a limit of their own; token number n of every response is n, the last one stops it.

    Args:
        length_of: Tokens of a request's whole response.

    Attributes:
        most_in_flight: Requests in flight at once, at most.
        log: Time and name of every request that was sent.
        begun_with: Tokens that each request was sent with, every time.
    """

    def __init__(self, length_of: Callable[[GenerationRequest], int]) -> None:
        self._length_of = length_of
        self._running: dict[str, _Running] = {}
        self._results: asyncio.Queue[GenerationResult] = asyncio.Queue()
        self._unread = 0
        self.version, self.paused = -1, False
        self.most_in_flight = 0
        self.log: list[tuple[float, str]] = []
        self.begun_with: dict[str, list[int]] = {}

    @property
    def servers(self) -> Sequence[ServerAddress]:
        return ()

    @property
    def num_in_flight(self) -> int:
        return len(self._running) + self._unread

    async def submit(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            name = request.request_id
            assert name not in self._running, f"{name} is in flight already"
            self.log.append((now(), name))
            begun = 0 if request.begun_token_ids is None else len(request.begun_token_ids)
            self.begun_with.setdefault(name, []).append(begun)
            self._running[name] = running = _Running(request, self._length_of(request))
            if running.begun:
                np.testing.assert_array_equal(request.begun_token_ids, np.arange(running.begun))
            if not self.paused:
                self._go(running)
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)

    async def stream(self) -> AsyncIterator[GenerationResult]:
        while self.num_in_flight:
            result = await self._results.get()
            self._unread -= 1
            yield result

    async def abort(self, request_ids: Collection[str]) -> None:
        for name in request_ids:
            if name in self._running:
                self._stop(self._running[name])
                self._end(name, "abort")

    async def pause(self, mode: PauseMode) -> None:
        self.paused = True
        for name in list(self._running):
            self._stop(self._running[name])
            if mode == "abort":
                self._end(name, "abort")

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        self.version, self.paused = policy_version, False
        for running in self._running.values():
            self._go(running)

    def crash(self, names: Collection[str]) -> None:
        """The server of these requests dies: the engine has them answered anew by another one."""
        for name in names:
            running = self._running[name]
            self._stop(running)
            running.versions.clear()
            if not self.paused:
                self._go(running)

    def break_off(self, names: Collection[str]) -> None:
        """A server ends these requests by itself."""
        for name in names:
            self._stop(self._running[name])
            self._end(name, "abort")

    @property
    def running(self) -> list[str]:
        return list(self._running)

    def _go(self, running: _Running) -> None:
        running.since = now()
        left = running.length - running.begun - len(running.versions)
        name = running.request.request_id
        running.timer = asyncio.get_running_loop().call_later(left / TOKENS_PER_S, self._finish, name)

    def _stop(self, running: _Running) -> None:
        """Count the tokens so far."""
        if running.since is None or running.timer is None:
            return
        running.timer.cancel()
        left = running.length - running.begun - len(running.versions)
        count = min(int((now() - running.since) * TOKENS_PER_S), left - 1)
        running.versions += [self.version] * count
        running.since = running.timer = None

    def _finish(self, name: str) -> None:
        running = self._running[name]
        running.versions += [self.version] * (running.length - running.begun - len(running.versions))
        self._end(name, "stop")

    def _end(self, name: str, reason: Any) -> None:
        running = self._running.pop(name)
        count = len(running.versions)
        versions = np.array(running.versions, dtype=np.int32)
        self._unread += 1
        self._results.put_nowait(
            GenerationResult(
                request_id=name,
                token_ids=np.arange(running.begun, running.begun + count, dtype=np.int32),
                log_probs=np.full(count, -0.5, dtype=np.float32),
                finish_reason=reason,
                policy_version=int(versions[0]) if count else self.version,
                policy_versions=versions,
            )
        )


class SimulatedPool:
    """Grades after a while: samples of a prompt whose answer is "signal" in turn right and wrong, others wrong."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.waiting = self.most_waiting = 0

    def submit(self, jobs: Sequence[ScoreJob]) -> Future[list[Score | ScoreFailure]]:
        future: Future[list[Score | ScoreFailure]] = Future()
        self.waiting += len(jobs)
        self.most_waiting = max(self.waiting, self.most_waiting)
        asyncio.get_running_loop().call_later(self.seconds, self._settle, future, jobs)
        return future

    def _settle(self, future: Future[list[Score | ScoreFailure]], jobs: Sequence[ScoreJob]) -> None:
        self.waiting -= len(jobs)
        if future.set_running_or_notify_cancel():
            future.set_result([self._grade(job) for job in jobs])

    def _grade(self, job: ScoreJob) -> Score | ScoreFailure:
        if job.response.reference == "broken":
            return ScoreFailure(sample_id=job.sample_id, kind="reference", term="sim", problem="no answer")
        index = int(job.sample_id.rsplit("#", 1)[1])
        score = float(index % 2) if job.response.reference == "signal" else 0.0
        return Score(score=score, reward=score, terms={"sim": score}, answer=None, timed_out=False)


class SimulatedPrompts:
    """Prompts p0, p1, … with an answer each; a limited number of them where `limit` is given."""

    def __init__(self, answer_of: Callable[[int], str], limit: int | None = None) -> None:
        self._answer_of, self._limit = answer_of, limit
        self.num_drawn, self.epoch = 0, 0

    def next(self, n: int) -> list[Prompt]:
        prompts = []
        for _ in range(n):
            if self.num_drawn == self._limit:
                raise EndOfPrompts("data.epochs = 1: the prompts have been drawn that often")
            prompts.append(
                Prompt(
                    id=f"p{self.num_drawn}",
                    token_ids=np.array([7, 7, 7], dtype=np.int32),
                    text="?",
                    answer=self._answer_of(self.num_drawn),
                )
            )
            self.num_drawn += 1
        return prompts

    def counters(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self.num_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_drawn = state["num_drawn"]


def number_of(prompt_id: str) -> int:
    """A prompt's number, from its id or from the name of one of its requests."""
    return int(prompt_id.rsplit(":", 1)[-1].split("#")[0].removeprefix("p"))


@dataclass(slots=True)
class Simulation:
    """All parts of a simulated run.

    Attributes:
        lengths: Tokens of each sample's response, by prompt and sample; MAX_TOKENS − 1 at most.
        answer_of: "signal", "none" or "broken" for each prompt.
        scoring_s: Time a response's grading takes.
        limit: Prompts that there are.
        config: Further fields of RolloutConfig.
        recipe: Further fields of BatchRecipe.
        engine: Kind of servers.
    """

    lengths: Callable[[int, int], int] = lambda prompt, sample: 10
    answer_of: Callable[[int], str] = lambda prompt: "signal"
    scoring_s: float = 0.0
    limit: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    engine: type[SimulatedEngine] = SimulatedEngine

    def build(self) -> tuple[RolloutController, SimulatedEngine]:
        values = {"num_prompts_per_step": 4, "group_size": 2, "engine": "sglang"} | self.config
        engine = self.engine(lambda request: self.lengths(number_of(request.prompt_id), request.sample_index))
        controller = RolloutController(
            engine=engine,
            scoring=Scoring(SimulatedPool(self.scoring_s), "fatal"),
            decode=lambda ids: f"{len(ids)} tokens",
            config=RolloutConfig(**values),
            sampling=SAMPLING,
            seed=3,
            recipe=BatchRecipe(
                stream=SimulatedPrompts(self.answer_of, self.limit),
                algorithm=DapoConfig(updates_per_rollout=1),
                num_records=1,
                **self.recipe,
            ),
        )
        return controller, engine


@dataclass(frozen=True, slots=True)
class Step:
    """A step as the trainer saw it.

    Attributes:
        version: The weights that it trained.
        began, got, ended: When it asked for its batch, had it, and had trained and sent its weights.
        collected: The batch.
    """

    version: int
    began: float
    got: float
    ended: float
    collected: CollectedGroups


async def train(
    controller: RolloutController,
    num_steps: int,
    train_s: float = 0.0,
    sync_s: float = 0.0,
    mode: PauseMode = "abort",
) -> list[Step]:
    """A trainer that takes so long for a batch and for sending its weights."""
    await controller.pause(mode)
    await controller.resume(0, ())
    steps = []
    for version in range(num_steps):
        began = now()
        collected = await controller.collect(version + 1, version)
        got = now()
        await asyncio.sleep(train_s)
        await controller.pause(mode)
        await asyncio.sleep(sync_s)
        await controller.resume(version + 1, ())
        steps.append(Step(version, began, got, now(), collected))
    return steps


def used_groups(steps: Sequence[Step]) -> Iterator[tuple[Step, RolloutGroup]]:
    return ((step, group) for step in steps for group in step.collected.groups)
