"""Signals to the processes of a run's servers at random moments, and what becomes of each: a watcher of rank 0."""

import os
import random
import signal
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from megatron_fipo.data.stream import EndOfPrompts
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.trainer.served_rollouts import ServedRollouts
from megatron_fipo.trainer.state import Run
from megatron_fipo.weight_sync.base import PushReport
from megatron_fipo.weight_sync.verification import VerificationReport
from tests.server_faults import ServerLife, server_lives

type Phase = Literal["start", "generation", "sync", "verification", "evaluation"]
type Kind = Literal["kill", "hang", "pause"]
"""SIGKILL; SIGSTOP; SIGSTOP and after some seconds SIGCONT."""

# How long each phase is looked at for the fault's random moment, in seconds.
_SPANS: dict[Phase, float] = {"start": 20.0, "generation": 1.5, "sync": 0.4, "verification": 0.1, "evaluation": 1.0}
_KINDS: tuple[Kind, ...] = ("kill", "kill", "kill", "hang", "pause")
_OF_SERVER = ("launcher", "scheduler")
_KILLED = (*_OF_SERVER, "detokenizer") * 2 + ("guard", "agent")
# Responses do not pass the detokenizer, and the guard only waits: nobody misses those while they are stopped.
_STOPPED = (*_OF_SERVER, "all") * 2 + ("agent",)
_LOOK_EVERY_S = 0.002
_PATIENCE_S = 420.0
_PHASES_OF_LOOP: dict[str, Phase] = {"weight_sync": "sync", "rollout": "generation", "evaluation": "evaluation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is to happen.

    Attributes:
        number: Which fault of the plan.
        phase: What the run is to be doing.
        kind: What is done to the victim.
        victim: The process, or "all" of the server's.
        server: Which server, if it can be had.
        moment: Where in the phase's span, from 0 to 1.
        seconds: How long a pause takes.
        waits_for_all: Whether all servers serve before.
    """

    number: int
    phase: Phase
    kind: Kind
    victim: str
    server: str
    moment: float
    seconds: float
    waits_for_all: bool


def plan(seed: int, count: int, num_servers: int) -> list[Fault]:
    """Faults of which every phase has as many as the others, and three of five kill."""
    draw = random.Random(seed)
    phases: list[Phase] = [list(_SPANS)[number % len(_SPANS)] for number in range(count)]
    kinds = [_KINDS[number % len(_KINDS)] for number in range(count)]
    draw.shuffle(phases)
    draw.shuffle(kinds)
    return [
        Fault(
            number=number,
            phase=phase,
            kind=kind,
            victim=draw.choice(_KILLED if kind == "kill" else _STOPPED),
            server=f"server{draw.randrange(num_servers)}",
            moment=draw.random(),
            seconds=draw.uniform(1.0, 6.0),
            waits_for_all=draw.random() < 0.7,
        )
        for number, (phase, kind) in enumerate(zip(phases, kinds, strict=True))
    ]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a fault.

    Attributes:
        fault: The fault.
        life: The life that it hit.
        phase: What the run was doing at that moment.
        step: Its step then.
        at: When, on the monotonic clock.
        successor: The life that served next in its place; the same one where it went on.
        serves_after_s: Until that one was seen to have the current weights.
        num_steps: Steps that were done meanwhile.
    """

    fault: Fault
    life: str
    phase: str
    step: int
    at: float
    successor: str | None = None
    serves_after_s: float | None = None
    num_steps: int | None = None


@dataclass(slots=True)
class Campaign(Progress):
    """Does one fault after the other while a run goes on, in a thread of rank 0; then the run may come to its end.

    Args:
        faults: The faults.
        num_servers: Servers of the run.

    Attributes:
        outcomes: What came of each.
        problem: Why it could not go on.
        is_over: Whether all is done, and all servers serve again.
    """

    faults: Sequence[Fault]
    num_servers: int
    outcomes: list[Outcome] = field(default_factory=list)
    problem: str | None = None
    is_over: bool = False
    _controller: int = 0
    _step: int = 0
    _doing: str = "start"
    _entered: dict[str, int] = field(default_factory=dict)
    _serving: dict[str, str] = field(default_factory=dict)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def begin(self, run: Run) -> None:
        """Watch a run, before it trains; on rank 0."""
        rollouts = run.rollout
        assert isinstance(rollouts, ServedRollouts) and rollouts.calls.link is not None
        self._controller = rollouts.calls.link.process.pid
        rollouts.transport = _WatchedTransport(rollouts.transport, self)
        rollouts.verification = _WatchedVerification(rollouts.verification, self)  # type: ignore[assignment]
        threading.Thread(target=self._run, name="faults", daemon=True).start()

    # What the run tells.

    def begin_step(self, step: int) -> None:
        """A step begins."""
        self._step = step

    def begin_phase(self, name: str) -> None:
        """A phase of the loop begins."""
        self.enter(_PHASES_OF_LOOP.get(name, "training"))

    def enter(self, phase: str) -> None:
        """The run begins to do something else."""
        with self._news:
            self._doing = phase
            self._entered[phase] = self._entered.get(phase, 0) + 1
            self._news.notify_all()

    def leave(self, phase: str) -> None:
        """It goes on with what it did before."""
        with self._news:
            self._doing = phase

    @property
    def doing(self) -> str:
        """What the run does."""
        return self._doing

    def note_serving(self, names: Collection[str]) -> None:
        """Servers have been seen to have the current weights."""
        now = time.monotonic()
        with self._news:
            for name in names:
                server = name.partition(".")[0]
                self._serving[server] = name
                for outcome in self.outcomes:
                    same_server = outcome.life.partition(".")[0] == server
                    if same_server and outcome.successor is None and (name != outcome.life or self._goes_on(outcome)):
                        outcome.successor, outcome.serves_after_s = name, now - outcome.at
                        outcome.num_steps = self._step - outcome.step
            self._news.notify_all()

    def _goes_on(self, outcome: Outcome) -> bool:
        return outcome.fault.kind == "pause" and time.monotonic() - outcome.at > outcome.fault.seconds

    # What it does.

    def _run(self) -> None:
        try:
            for fault in self.faults:
                self._do(fault)
            self._wait_until(
                lambda: all(outcome.successor for outcome in self.outcomes), "every server that serves again"
            )
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
        self.is_over = True

    def _do(self, fault: Fault) -> None:
        if fault.phase == "start":
            life = self._wait_for_start(fault)
        else:
            needed = self.num_servers if fault.waits_for_all else 1
            self._wait_until(lambda: len(self._alive()) >= needed, f"{needed} servers that serve")
            before = self._entered.get(fault.phase, 0)
            self._wait_until(lambda: self._entered.get(fault.phase, 0) > before, f"the next {fault.phase}")
            life = None
        time.sleep(fault.moment * _SPANS[fault.phase])
        if life is None:
            alive = self._alive()
            life = alive.get(fault.server) or next(iter(alive.values()), None)
        # It has ended since: then another one is looked for.
        if life is None or not (victims := _victims(life, fault.victim)):
            return self._do(fault)
        with self._news:
            phase = self._doing if life.name in self._serving.values() else "start"
            self.outcomes.append(
                Outcome(fault=fault, life=life.name, phase=phase, step=self._step, at=time.monotonic())
            )
            self._forget(life, fault)
        _signal(victims, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        if fault.kind == "pause":
            time.sleep(fault.seconds)
            _signal(victims, signal.SIGCONT)

    def _forget(self, life: ServerLife, fault: Fault) -> None:
        """Count on a server no more until it is seen to serve again."""
        agent_dies = fault.victim == "agent"
        for server, name in list(self._serving.items()):
            if name == life.name or agent_dies:
                del self._serving[server]

    def _alive(self) -> dict[str, ServerLife]:
        """Servers that have the current weights, as far as is known."""
        lives = server_lives(self._controller)
        return {server: life for server, life in lives.items() if self._serving.get(server) == life.name}

    def _wait_for_start(self, fault: Fault) -> ServerLife:
        """A server that is not ready yet; where none is starting, one is killed."""
        deadline = time.monotonic() + _PATIENCE_S
        hit = {outcome.life for outcome in self.outcomes}
        while time.monotonic() < deadline:
            known = set(self._serving.values()) | hit
            starting = {s: life for s, life in server_lives(self._controller).items() if life.name not in known}
            if starting:
                return starting.get(fault.server) or next(iter(starting.values()))
            if alive := self._alive():
                life = alive.get(fault.server) or next(iter(alive.values()))
                _signal([life.group], signal.SIGKILL)
                with self._news:
                    self._forget(life, fault)
            time.sleep(0.1)
        raise TimeoutError("no server starts")

    def _wait_until(self, holds: Any, what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{what} has not come in {_PATIENCE_S:g} s; the run is in step {self._step}, {self._doing}"
                )
            with self._news:
                self._news.wait(_LOOK_EVERY_S)


def _victims(life: ServerLife, title: str) -> list[int]:
    """Processes to send a signal to; where a server that starts has none of that title yet, its first one."""
    try:
        first = psutil.Process(life.group)
        match title:
            case "all":
                return life.processes()
            case "launcher":
                return [first.pid]
            case "guard":
                return [first.ppid()]
            case "agent":
                return [psutil.Process(first.ppid()).ppid()]
            case _:
                return life.processes(title)[-1:] or [first.pid]
    except psutil.Error:
        return []


def _signal(processes: Sequence[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


class _WatchedTransport:
    def __init__(self, inner: Any, campaign: Campaign) -> None:
        self._inner, self._campaign = inner, campaign

    def push(self, policy_version: int, servers: Sequence[ServerAddress]) -> PushReport:
        before = self._campaign.doing
        self._campaign.enter("sync")
        try:
            report: PushReport = self._inner.push(policy_version, servers)
            return report
        finally:
            self._campaign.leave(before)


class _WatchedVerification:
    def __init__(self, inner: Any, campaign: Campaign) -> None:
        self._inner, self._campaign = inner, campaign

    def expect(self) -> None:
        self._inner.expect()

    def check(self, policy_version: int, servers: Sequence[ServerAddress]) -> VerificationReport:
        before = self._campaign.doing
        self._campaign.enter("verification")
        try:
            report: VerificationReport = self._inner.check(policy_version, servers)
        finally:
            self._campaign.leave(before)
        self._campaign.note_serving({server.name for server in servers} - set(report.failed))
        return report


class EndingRollouts:
    """A run's rollouts, which have no prompts left once a campaign is over; collective over all ranks.

    Args:
        inner: The rollouts.
        campaign: The campaign, on rank 0 alone.
    """

    def __init__(self, inner: ServedRollouts, campaign: Campaign | None) -> None:
        self._inner, self._campaign = inner, campaign

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def next_rollout(self, step: int, policy_version: int) -> Any:
        """A training batch, or the end."""
        if broadcast_json(None if self._campaign is None else self._campaign.is_over, 0):
            raise EndOfPrompts("the campaign is over")
        return self._inner.next_rollout(step, policy_version)


def as_values(outcome: Outcome) -> Mapping[str, Any]:
    """An outcome as plain values."""
    fault = outcome.fault
    return {
        "fault": fault.number,
        "kind": fault.kind,
        "seconds": round(fault.seconds, 1) if fault.kind == "pause" else None,
        "victim": fault.victim,
        "wanted_phase": fault.phase,
        "phase": outcome.phase,
        "step": outcome.step,
        "life": outcome.life,
        "successor": outcome.successor,
        "serves_after_s": None if outcome.serves_after_s is None else round(outcome.serves_after_s, 1),
        "steps_meanwhile": outcome.num_steps,
    }
