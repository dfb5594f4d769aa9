"""Servers on the trainer's devices: either has their memory in turn, and here is who hands over what when."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.sglang.client import MemoryTag
from megatron_fipo.runtime.errors import BreakdownError, RunError
from megatron_fipo.weight_sync.server_calls import ServerCalls, failures

type Failed = Mapping[str, str]
"""Why servers did not do as asked, by their names."""

type Push = Callable[[Sequence[ServerAddress]], Failed]
"""Sends the current weights to servers; collective over all ranks."""


class TrainerMemory(Protocol):
    """One rank's part of the trainer's memory."""

    def offload_optimizer(self) -> None:
        """Take all but the weights off the device."""
        ...

    def offload_parameters(self) -> None:
        """Take the weights off the device."""
        ...

    def restore_parameters(self) -> None:
        """Put the weights back."""
        ...

    def restore(self) -> None:
        """Put everything back; nothing where everything is there."""
        ...

    def drain(self) -> int:
        """Bytes freed since the last call."""
        ...


class EngineMemory(Protocol):
    """The servers' memory, on rank 0. What a server has released it does not release again, and so with resuming."""

    def resume(self, tag: MemoryTag, servers: Sequence[ServerAddress]) -> Failed:
        """Have servers take memory again, without what was in it."""
        ...

    def release(self, tag: MemoryTag, servers: Sequence[ServerAddress]) -> Failed:
        """Have servers give memory back; they must be paused and idle."""
        ...


class Colocation:
    """Hands the devices' memory to and fro; all methods are collective over all ranks.

    A server that cannot take its memory is reported as one that did not take in the weights, to be restarted. One that
    does not give it back ends the run, since the trainer cannot go on.

    Args:
        trainer: This rank's actor.
        engine: The servers; None on ranks other than 0.
    """

    def __init__(self, trainer: TrainerMemory, engine: EngineMemory | None) -> None:
        self.trainer, self.engine = trainer, engine
        self._seconds = 0.0

    def vacate(self) -> None:
        """Take the trainer off its devices before servers start on them: what is free then is theirs for good.

        Once they have started, `to_trainer` puts it back.
        """
        self._on_trainer(self.trainer.offload_optimizer)
        self._on_trainer(self.trainer.offload_parameters)

    def to_servers(self, servers: Sequence[ServerAddress], push: Push) -> dict[str, str]:
        """The servers' turn begins: they have the current weights afterwards, and all the memory.

        Args:
            servers: All of them, paused; the same on every rank.
            push: Sends them the weights.

        Returns:
            Servers that do not have memory and weights, and why.

        Raises:
            RunError: From `push`; the trainer has its memory again.
        """
        try:
            self._on_trainer(self.trainer.offload_optimizer)
            failed = self._resume("weights", servers)
            failed |= push(_others(servers, failed))
            self._on_trainer(self.trainer.offload_parameters)
            failed |= self._resume("kv_cache", _others(servers, failed))
        except RunError as error:
            problem = str(error)
            try:
                self.to_trainer(servers)
            except RunError as another:
                # Whether the run may be started again depends on what the servers did.
                kind = BreakdownError if isinstance(another, BreakdownError) else RunError
                raise kind(f"{problem}. Besides, {another}") from error
            raise
        return failed

    def to_trainer(self, servers: Sequence[ServerAddress]) -> None:
        """The trainer's turn begins: it has all the memory, and no server can generate.

        Args:
            servers: All of them, paused and idle; the same on every rank.

        Raises:
            BreakdownError: A server did not release its memory. The trainer has what there is, which may be too little.
            RunError: Memory is missing elsewhere.
        """
        failed = self._release("kv_cache", servers) | self._release("weights", servers)
        problem = "".join(
            f"server {name} does not give GPU memory back to the trainer: {reason}. " for name, reason in failed.items()
        )
        try:
            self._on_trainer(self.trainer.restore)
        except RunError as error:
            raise (BreakdownError if problem else RunError)(f"{problem}{error}") from error
        if problem:
            raise BreakdownError(f"{problem}See its log; rollout.colocated: false gives servers GPUs of their own")

    def push_again(self, servers: Sequence[ServerAddress], push: Push) -> dict[str, str]:
        """Send the weights once more in the servers' turn, as to one that was restarted.

        The others keep their memory meanwhile, so there must be room for the weights beside it.

        Args:
            servers: Those that need them; the same on every rank.
            push: Sends them.
        """
        self._on_trainer(self.trainer.restore_parameters)
        failed = push(servers)
        self._on_trainer(self.trainer.offload_parameters)
        return dict(failed)

    def drain(self) -> dict[str, float]:
        """Metrics of the hand-overs since the last call: this rank's bytes, and seconds."""
        metrics = {"perf/offload_gib": self.trainer.drain() / 1024**3, "perf/offload_s": self._seconds}
        self._seconds = 0.0
        return metrics

    def _on_trainer(self, action: Callable[[], None]) -> None:
        """Go on when every rank has done it: a server takes memory of several ranks' devices."""
        with self._timed():
            on_every_rank(action)

    def _resume(self, tag: MemoryTag, servers: Sequence[ServerAddress]) -> dict[str, str]:
        return self._on_engine(lambda engine: engine.resume(tag, servers))

    def _release(self, tag: MemoryTag, servers: Sequence[ServerAddress]) -> dict[str, str]:
        return self._on_engine(lambda engine: engine.release(tag, servers))

    def _on_engine(self, action: Callable[[EngineMemory], Failed]) -> dict[str, str]:
        with self._timed():
            failed = on_main_rank(lambda: None if self.engine is None else dict(action(self.engine)))
            told: dict[str, str] = broadcast_json(failed, 0)
        return told

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started


class ServerMemory:
    """Memory of SGLang servers, asked for over HTTP. It knows what each has released: a second time would end it.

    Args:
        calls: Speaks to the servers.
        timeout_s: How long a server may take.
    """

    def __init__(self, calls: ServerCalls, timeout_s: float) -> None:
        self.calls, self.timeout_s = calls, timeout_s
        self._released: set[tuple[str, MemoryTag]] = set()

    def resume(self, tag: MemoryTag, servers: Sequence[ServerAddress]) -> Failed:
        """Those that have released the memory take it again."""
        asked = [server for server in servers if (server.name, tag) in self._released]
        failed = failures(
            self.calls.start_all(asked, lambda server: server.resume_memory_occupation([tag], self.timeout_s))
        )
        self._released -= {(server.name, tag) for server in _others(asked, failed)}
        return failed

    def release(self, tag: MemoryTag, servers: Sequence[ServerAddress]) -> Failed:
        """Those that hold the memory give it back."""
        asked = [server for server in servers if (server.name, tag) not in self._released]
        failed = failures(
            self.calls.start_all(asked, lambda server: server.release_memory_occupation([tag], self.timeout_s))
        )
        self._released |= {(server.name, tag) for server in _others(asked, failed)}
        return failed


def _others(servers: Sequence[ServerAddress], failed: Failed) -> list[ServerAddress]:
    return [server for server in servers if server.name not in failed]
