"""One sender's end of a broadcast into servers."""

import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore

from megatron_fipo.platform.device import uses_cuda
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.sglang.client import ServerRefusedError
from megatron_fipo.weight_sync.flat_buckets import FlatTensor
from megatron_fipo.weight_sync.groups import address_towards, host_store, join_group, leave_group
from megatron_fipo.weight_sync.server_calls import Call, ServerCalls, failures

# How long servers that were in a broken group have to show that they still answer, beside the usual deadline.
_GRACE_S = 20.0


class BrokenGroupError(Exception):
    """A broadcast did not reach every server.

    Attributes:
        lost: Servers that no longer answer or that refused, with the reason; the others may be tried again.
    """

    def __init__(self, lost: dict[str, str]) -> None:
        super().__init__(lost)
        self.lost = lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """A bucket under way.

    Attributes:
        broadcast: Ends when the bytes have left.
        replies: The servers' answers by name.
    """

    broadcast: Future[None]
    replies: dict[str, Future[None]]


class SenderGroup:
    """A process group of this rank and all ranks of some servers.

    A server that hangs can take others with it, which wait for it inside the broadcast: those that do not answer soon
    after the group has been given up count as lost too.

    Args:
        servers: The servers, in the order of their ranks.
        calls: Connections to them.
        timeout_s: How long a server may take to join, and for one bucket.

    Raises:
        BrokenGroupError: A server did not join.
    """

    def __init__(self, servers: Sequence[ServerAddress], calls: ServerCalls, timeout_s: float) -> None:
        self.servers, self._calls, self._timeout_s = list(servers), calls, timeout_s
        self.name = f"weights-{uuid.uuid4().hex}"
        self._group: dist.ProcessGroup | None = None
        self._store: TCPStore | None = None
        self._join()

    @property
    def names(self) -> list[str]:
        """Names of the servers, in the order of their ranks."""
        return [server.name for server in self.servers]

    def _join(self) -> None:
        backend = "nccl" if uses_cuda() else "gloo"
        timeout = timedelta(seconds=self._timeout_s)
        host = address_towards([server.url for server in self.servers])
        # Dropping the store ends the wait of whoever has not yet found the others.
        self._store = host_store(host, timeout)
        address = (host, int(self._store.port))
        world_size = 1 + sum(server.tensor_parallel_size for server in self.servers)
        replies: dict[str, Future[Any]] = {}
        offset = 1
        for server in self.servers:
            replies[server.name] = self._calls.start(server, self._call_to_join(address, offset, world_size, backend))
            offset += server.tensor_parallel_size
        joined = _in_background(lambda: join_group(address, self.name, 0, world_size, backend, timeout))
        self._complete(joined, replies)
        self._group = joined.result()

    def _call_to_join(self, address: tuple[str, int], offset: int, world_size: int, backend: str) -> Call[None]:
        return lambda server: server.init_weights_update_group(
            address, offset, world_size, self.name, backend, self._timeout_s
        )

    def send(self, buffer: Tensor, places: Sequence[FlatTensor]) -> Sending:
        """Begin to send a bucket.

        Args:
            buffer: [n] uint8, filled; must stay as it is until `finish`.
            places: What is in it.
        """
        if buffer.is_cuda:
            torch.cuda.current_stream().synchronize()
        tensors = {place.name: (place.dtype_name, place.shape) for place in places}
        replies = self._calls.start_all(
            self.servers,
            lambda server: server.update_weights_from_distributed(
                tensors, self.name, self._timeout_s, load_format="flattened_bucket"
            ),
        )
        return Sending(broadcast=_in_background(lambda: self._broadcast(buffer)), replies=replies)

    def finish(self, sending: Sending) -> None:
        """Wait until every server has loaded a bucket.

        Raises:
            BrokenGroupError: One has not; the group cannot be used any more.
        """
        self._complete(sending.broadcast, sending.replies)

    def leave(self, reachable: Collection[str]) -> None:
        """End the group, here and on the servers named, which have `_GRACE_S` to do so."""
        others = [server for server in self.servers if server.name in reachable]
        replies = self._calls.start_all(others, lambda server: server.destroy_weights_update_group(self.name, _GRACE_S))
        self._give_up()
        wait(replies.values(), timeout=_GRACE_S)

    def _broadcast(self, buffer: Tensor) -> None:
        assert self._group is not None, "a group that was given up is not used"
        if not buffer.is_cuda:
            dist.broadcast(buffer, group_src=0, group=self._group)
            return
        stream = torch.cuda.Stream(buffer.device)
        with torch.cuda.stream(stream):
            dist.broadcast(buffer, group_src=0, group=self._group)
        stream.synchronize()

    def _complete(self, local: Future[Any], replies: Mapping[str, Future[Any]]) -> None:
        """Wait until this rank's part and all servers' parts of one collective are done; if one fails, give up."""
        deadline = time.monotonic() + self._timeout_s
        everything = [local, *replies.values()]
        wait(everything, timeout=self._timeout_s, return_when=FIRST_EXCEPTION)
        if all(each.done() and each.exception() is None for each in everything):
            return
        self._give_up()
        # Servers that wait for this rank's part of the collective answer once it has ended.
        wait([local], timeout=max(deadline - time.monotonic(), 0.0) + _GRACE_S)
        problems = failures(replies, _GRACE_S)
        refused = {name for name, reply in replies.items() if _was_refused(reply)}
        lost = {name: problem for name, problem in problems.items() if name not in refused}
        # A server that refuses may do so only because another one has broken the group off.
        raise BrokenGroupError(lost or problems or dict.fromkeys(replies, f"the broadcast failed: {_problem(local)}"))

    def _give_up(self) -> None:
        """Leave the group, ending what is under way where that is possible."""
        self._store = None
        if self._group is not None:
            leave_group(self._group)
            self._group = None


def _was_refused(reply: Future[Any]) -> bool:
    return reply.done() and not reply.cancelled() and isinstance(reply.exception(), ServerRefusedError)


def _problem(local: Future[Any]) -> str:
    return str(local.exception()) if local.done() else "it did not end"


def _in_background[T](action: Callable[[], T]) -> Future[T]:
    """Do something in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight sync", daemon=True).start()
    return future
