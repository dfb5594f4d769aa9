"""Beside a rank's main thread: hears signals, sees other ranks die and runs hang, and ends the process in good order.

A thread with an event loop of its own, which speaks to the same thread of the other ranks through the side channel.
Rank 0's decides for all: it is told of every signal, sees which rank is gone, and how long nobody has made progress.
"""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from megatron_fipo.config.base import ConfigError
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.exit_codes import FAILED, GO_ON
from megatron_fipo.runtime.stop_request import StopRequest, StopRequested
from megatron_fipo.runtime.watchdog.side_channel import Hub, Line, Peer
from megatron_fipo.runtime.watchdog.stall_report import (
    RankState,
    python_stacks,
    report,
    summary,
    waits_for_ranks,
)
from megatron_fipo.runtime.watchdog.stop_signals import stop_signals
from megatron_fipo.runtime.watchdog.whereabouts import START_UP, Whereabouts

BEAT_S = 1.0
"""Time between two signs of life."""
DEATH_GRACE_S = 1.0
"""How long rank 0 waits for further ranks to be gone, and for a failing rank's own words, before it ends the run."""
ECHO_S = 4.0
"""How long a rank with an error waits whether this is only the echo of another rank's death."""
ANSWER_S = 10.0
"""How long ranks have to tell what they do; one that has missed some beats is not waited for."""
_SILENT_BEATS = 3
WRITE_S = 20.0
"""How long the report may take to be written: the file system may be what hangs."""
_SECOND_AFTER_S = 1.0
_PARTING_S = 2.0
GOES_ON = "the same command goes on"
"""What becomes of most work after an early end."""
_ENDING_S = 60.0
_LONG_PHASES = frozenset({START_UP, "rollout", "evaluation", "weight_sync", "checkpoint", "export"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """What a watchdog goes by.

    Attributes:
        rank: This rank.
        speaks: Whether this rank says why it ends where rank 0 cannot.
        name: What the ranks do, as it is called in messages.
        logs: Where reports go.
        stop_within_s: How long the run may take to come to an end on request.
        stall_after_s: Seconds without progress that are too many; 0 for any number.
        long_stall_after_s: The same in phases whose pieces of work take long.
        stop_statuses: Exit status of the process by the signal that ended it in good order.
        way_on: What becomes of the work after an early end.
    """

    rank: int
    speaks: bool
    name: str
    logs: Path
    stop_within_s: float
    stall_after_s: float
    long_stall_after_s: float
    stop_statuses: Mapping[str, int] = field(default_factory=dict)
    way_on: str = GOES_ON


class Watchdog:
    """A rank's watchdog; a context that its main thread enters before the process group is made.

    Args:
        settings: What it goes by.
        where: Tells where this rank is.
        stop: Told of a request for an end.
        last_collectives: Tells which collective every process group saw last.
        breakdown_status: Gives the exit status where a rank has died or the run hangs.

    Attributes:
        has_joined: Whether this rank's watchdog speaks to the others', or will, as rank 0's.
    """

    def __init__(
        self,
        settings: WatchSettings,
        where: Whereabouts,
        stop: StopRequest,
        last_collectives: Callable[[], list[dict[str, Any]]] = list,
        breakdown_status: Callable[[], int] = lambda: GO_ON,
    ) -> None:
        self._settings, self._where, self._stop = settings, where, stop
        self._last_collectives, self._breakdown_status = last_collectives, breakdown_status
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="watchdog", daemon=True)
        self._resources = ExitStack()
        self._hub = Hub(self._hear_peer, self._lose_peer)
        self._line = Line(self._hear_hub, self._lose_hub)
        self._hub_has_left = self._hub_is_gone = self.has_joined = self._is_ending = False
        self._first_signal_at = self._asked_at = self._hub_heard_at = self._own_changed_at = 0.0
        self._own_changes = -1
        self._gone: list[Peer] = []
        self._signals: socket.socket | None = None

    @property
    def _is_main(self) -> bool:
        return self._settings.rank == 0

    @property
    def _died(self) -> str:
        return f"died without a word; {self._settings.way_on}"

    def __enter__(self) -> Self:
        signals = self._resources.enter_context(stop_signals())
        self._thread.start()
        self._run(self._begin(signals))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = ""
        if isinstance(error, Exception) and not isinstance(error, ConfigError | RunError | StopRequested):
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if self.has_joined:
                # Where another rank is gone, this process ends here: its own error is an echo, and its text misleads.
                time.sleep(ECHO_S)
                if self._is_ending or self._gone or self._hub_is_gone:
                    time.sleep(_ENDING_S)
        self._run(self._part(failure))
        self._resources.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self, host: str) -> dict[str, Any]:
        """On rank 0: listen at an address; returns what the others need to `join`."""
        self.has_joined = True
        return self._run(self._hub.open(host))

    def join(self, address: Mapping[str, Any]) -> None:
        """On another rank: join rank 0.

        Raises:
            OSError: It cannot be reached.
        """
        self._run(self._line.connect(address, self._settings.rank))
        self._hub_heard_at = self._loop.time()
        self.has_joined = True

    def _run[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _begin(self, signals: socket.socket | None) -> None:
        self._own_changed_at = self._loop.time()
        self._signals = signals
        if signals is not None:
            self._loop.add_reader(signals, self._take_signals, signals)
        self._watching = asyncio.ensure_future(self._watch())

    async def _part(self, failure: str) -> None:
        """Leave the others in good order, or with word of a failure."""
        if self._signals is not None:
            # It is closed before the loop is.
            self._loop.remove_reader(self._signals)
        own = f"rank {self._settings.rank} ({socket.gethostname()}, process {os.getpid()})"
        text = f"{own} failed: {failure}"
        if self._is_main:
            self._hub.send({"end": FAILED} if failure else {"leaves": True})
            await self._hub.close()
        else:
            self._line.send({"failed": text} if failure else {"leaves": True})
            await self._line.close()
        self._watching.cancel()
        await asyncio.wait([self._watching])

    # Signals.

    def _take_signals(self, signals: socket.socket) -> None:
        with suppress(BlockingIOError):
            for number in signals.recv(256):
                with suppress(ValueError):
                    self._take_signal(signal.Signals(number))

    def _take_signal(self, number: signal.Signals) -> None:
        now = self._loop.time()
        if not self._first_signal_at:
            self._first_signal_at = now
            if self._is_main:
                self._ask(number.name)
            elif self._line.is_open:
                self._line.send({"signal": number.name})
                self._line.wake()
            elif self._hub_is_gone:
                # A launcher ends all ranks once one has died.
                self._end_without_hub()
            else:
                self._leave(self._stop_status(number.name), "")
        # A launcher passes on what it got itself, within moments.
        elif now - self._first_signal_at >= _SECOND_AFTER_S and number != signal.SIGUSR1:
            status = 128 + number
            self._line.send({"at_once": [number.name, status]})
            self._begin_end(status, self._at_once(number.name) if self._is_main else "")

    def _ask(self, signal_name: str) -> None:
        """On rank 0: have all ranks come to an end."""
        if not self._asked_at:
            self._asked_at = self._loop.time()
            self._stop.ask(signal_name)
            self._hub.send({"stop": signal_name})
            self._hub.wake()
            self._see_to_stop()

    def _see_to_stop(self) -> None:
        if self._gone:
            # The run is ended for that in a moment.
            return
        name, signal_name = self._settings.name, self._stop.signal
        if self._stop.has_nothing_to_save:
            self._begin_end(self._stop_status(signal_name), f"{name} ended on {signal_name}; {self._settings.way_on}")
        elif self._loop.time() - self._asked_at > self._settings.stop_within_s:
            self._begin_end(
                self._stop_status(signal_name),
                f"{name} did not come to an end within {self._settings.stop_within_s:g} s after {signal_name}; "
                "it goes on from its last checkpoint",
            )

    def _at_once(self, signal_name: str) -> str:
        return f"{self._settings.name} ended at once on a second {signal_name}"

    def _stop_status(self, signal_name: str) -> int:
        return self._settings.stop_statuses.get(signal_name, GO_ON)

    # The side channel.

    def _hear_peer(self, peer: Peer, message: Mapping[str, Any]) -> None:
        peer.heard_at = self._loop.time()
        if "where" in message:
            if peer.where.get("changes") != message["where"]["changes"]:
                peer.changed_at = peer.heard_at
            peer.where = message["where"]
        if "answer" in message:
            peer.answer = message["answer"]
        if "signal" in message:
            self._ask(message["signal"])
        if "at_once" in message:
            signal_name, status = message["at_once"]
            self._begin_end(status, self._at_once(signal_name))
        if "end" in message:
            self._begin_end(message["end"], "")
        if "failed" in message:
            peer.has_left = True
            self._begin_end(FAILED, f"{self._settings.name} stopped: {message['failed']}")
        if "leaves" in message:
            peer.has_left = True

    def _lose_peer(self, peer: Peer) -> None:
        if not peer.has_left and not self._is_ending:
            self._gone.append(peer)
            if len(self._gone) == 1:
                self._loop.call_later(DEATH_GRACE_S, self._end_with_the_dead)

    def _end_with_the_dead(self) -> None:
        names = ", ".join(peer.name for peer in sorted(self._gone, key=lambda each: each.rank)[:8])
        more = f" and {len(self._gone) - 8} more ranks" if len(self._gone) > 8 else ""
        self._begin_end(None, f"{self._settings.name} stopped: {names}{more} {self._died}")

    def _hear_hub(self, message: Mapping[str, Any]) -> None:
        self._hub_heard_at = self._loop.time()
        if "stop" in message:
            self._asked_at = self._loop.time()
            self._stop.ask(message["stop"])
        if "explain" in message:
            self._loop.run_in_executor(None, self._answer)
        if "end" in message:
            self._leave(message["end"], "")
        if "leaves" in message:
            self._hub_has_left = True

    def _lose_hub(self) -> None:
        if not self._hub_has_left and not self._is_ending:
            self._hub_is_gone = True
            self._loop.call_later(DEATH_GRACE_S, self._end_without_hub)

    def _end_without_hub(self) -> None:
        self._begin_end(None, f"{self._settings.name} stopped: {self._line.hub_name} {self._died}")

    def _answer(self) -> None:
        """Tell rank 0 what this one does; in a thread of its own."""
        answer = {"where": self._where.told(), "answer": self._own_answer()}
        self._loop.call_soon_threadsafe(self._line.send, answer)

    def _own_answer(self) -> dict[str, Any]:
        # The watchdog's own threads say nothing of the run.
        own = {self._thread.ident, threading.get_ident()}
        return {"stacks": python_stacks(own), "waits": waits_for_ranks(), "collectives": self._last_collectives()}

    # Hangs.

    async def _watch(self) -> None:
        while True:
            due = self._loop.time() + BEAT_S
            await asyncio.sleep(BEAT_S)
            late_s = self._loop.time() - due
            if late_s > BEAT_S:
                # What the others said while this process itself was busy or stopped is yet to be heard.
                self._excuse(late_s)
            told = self._where.told()
            if told["changes"] != self._own_changes:
                self._own_changes, self._own_changed_at = told["changes"], self._loop.time()
            if self._is_main:
                self._hub.send({})
                await self._check_all()
            else:
                self._line.send({"where": told})
                await self._check_hub()

    def _excuse(self, late_s: float) -> None:
        self._hub_heard_at += late_s
        self._own_changed_at += late_s
        for peer in self._hub.peers.values():
            peer.heard_at += late_s
            peer.changed_at += late_s

    async def _check_all(self) -> None:
        if self._asked_at:
            self._see_to_stop()
        states = self._states()
        longest = self._settings.stall_after_s
        if not longest or self._is_ending:
            return
        silent_s = max(each.heard_s for each in states if not each.has_left)
        idle_s = min(each.idle_s for each in states)
        allowed = min((self._allowed(each) for each in states if not each.has_left), key=lambda each: each[1])
        if silent_s > longest:
            reason = f"nothing has been heard of a rank for {silent_s:.0f} s (watchdog.stall_after_s = {longest:g})"
            await self._explain(reason)
        elif allowed[1] and idle_s > allowed[1]:
            await self._explain(
                f"no rank has made progress for {idle_s:.0f} s (watchdog.{allowed[0]} = {allowed[1]:g})"
            )

    def _allowed(self, state: RankState) -> tuple[str, float]:
        """Seconds that a rank may go without progress where it is, 0 for any number; and the setting's name."""
        if state.where.get("phase", START_UP) in _LONG_PHASES:
            return "long_stall_after_s", self._settings.long_stall_after_s
        return "stall_after_s", self._settings.stall_after_s

    def _states(self, own_answer: Mapping[str, Any] | None = None) -> list[RankState]:
        now, answer = self._loop.time(), own_answer or {}
        own = RankState(
            rank=self._settings.rank,
            host=socket.gethostname(),
            process=os.getpid(),
            heard_s=0.0,
            idle_s=now - self._own_changed_at,
            where=self._where.told(),
            **answer,
        )
        others = [
            RankState(
                rank=peer.rank,
                host=peer.host,
                process=peer.process,
                heard_s=now - peer.heard_at,
                idle_s=now - peer.changed_at,
                where=peer.where,
                has_left=peer.has_left,
                **peer.answer,
            )
            for _, peer in sorted(self._hub.peers.items())
        ]
        return [own, *others]

    async def _explain(self, reason: str) -> None:
        """On rank 0: find out what every rank does, write it down, and end the run."""
        for peer in self._hub.peers.values():
            peer.answer = {}
        self._hub.send({"explain": True})
        own = self._loop.run_in_executor(None, self._own_answer)
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                while any(self._may_answer(peer) for peer in self._hub.peers.values()):
                    await asyncio.sleep(0.05)
        await self._report_stall(f"{self._settings.name} hangs: {reason}", self._states(await own))

    def _may_answer(self, peer: Peer) -> bool:
        """Whether an answer may still come."""
        return not peer.answer and not peer.has_left and self._loop.time() - peer.heard_at < _SILENT_BEATS * BEAT_S

    async def _check_hub(self) -> None:
        """On another rank: rank 0 may be what is stopped, and then nobody asks."""
        longest, silent_s = self._settings.stall_after_s, self._loop.time() - self._hub_heard_at
        if self._asked_at and self._loop.time() - self._asked_at > self._settings.stop_within_s + ANSWER_S:
            self._begin_end(self._stop_status(self._stop.signal), "")
        # Rank 0 goes first where it can.
        if not longest or not self.has_joined or silent_s <= longest + ANSWER_S or self._hub_has_left:
            return
        own = await self._loop.run_in_executor(None, self._own_answer)
        reason = f"{self._settings.name} hangs: {self._line.hub_name} has not been heard of for {silent_s:.0f} s"
        await self._report_stall(reason, self._states(own)[:1])

    async def _report_stall(self, reason: str, states: Sequence[RankState]) -> None:
        step = states[0].where["step"]
        rank = "" if self._is_main else f"_rank_{self._settings.rank}"
        path = self._settings.logs / f"stall_{step}_{time.strftime('%Y%m%d_%H%M%S')}{rank}.txt"

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report(reason, states), encoding="utf-8")

        try:
            async with asyncio.timeout(WRITE_S):
                await self._loop.run_in_executor(None, write)
            place = f"all of it is in {path}"
        except (OSError, TimeoutError) as error:
            place = f"the report could not be written to {path} ({error or 'the file system does not answer'})"
        if not self._is_main:
            # Rank 0, once it is awake, ends the others, which write a report of their own.
            await asyncio.sleep(_PARTING_S)
        self._begin_end(
            None, f"{summary(reason, states) if self._is_main else reason}; {place}; {self._settings.way_on}"
        )

    # Ends.

    def _begin_end(self, status: int | None, text: str) -> None:
        """End all ranks, this one last; without a status it is that of a breakdown."""
        if not self._is_ending:
            self._is_ending = True
            self._ending = asyncio.ensure_future(self._end(status, text))

    async def _end(self, status: int | None, text: str) -> None:
        if status is None:
            status = await self._loop.run_in_executor(None, self._breakdown_status)
        if self._is_main:
            self._hub.send({"end": status})
            self._hub.wake()
            await self._hub.close(_PARTING_S)
        else:
            # Else rank 0, which was stopped perhaps, would take it for a death.
            self._line.send({"end": status})
            self._line.wake()
            await self._line.close()
        self._leave(status, text if self._is_main or self._settings.speaks else "")

    def _leave(self, status: int, text: str) -> NoReturn:
        """End this process where it is; what it started ends with it."""
        # A live view gives the terminal back, if it can.
        closing = threading.Thread(target=self._where.close, daemon=True)
        closing.start()
        closing.join(_PARTING_S)
        if text:
            with suppress(OSError):
                os.write(2, f"megatron-fipo: {text}\n".encode(errors="replace"))
        os._exit(status)
