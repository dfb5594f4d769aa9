"""What surrounds the transfer of one version of weights, whatever the transport."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.sglang.client import ServerRefusedError, SglangServer
from megatron_fipo.weight_sync.server_calls import Call, ServerCalls, failures


class WeightUpdate:
    """Servers that take in one version: who still does, and why others no longer do. The same on every rank.

    Args:
        calls: Connections to the servers; used on rank 0.
        servers: Those that are to have the version.
        config: Deadlines, and what becomes of running requests.
    """

    def __init__(self, calls: ServerCalls, servers: Sequence[ServerAddress], config: WeightSyncConfig) -> None:
        self._calls, self._config = calls, config
        self._servers = list(servers)
        self.failed: dict[str, str] = {}

    @property
    def alive(self) -> list[ServerAddress]:
        """Servers that have not failed, in the order given."""
        return [server for server in self._servers if server.name not in self.failed]

    def fail(self, problems: dict[str, str]) -> None:
        """Leave servers out from now on; the problems are the same on every rank."""
        self.failed |= problems

    def ask_all(self, call: Call[Any]) -> None:
        """Have rank 0 ask every server that is left; those that do not comply are left out."""
        self.ask_each(lambda _: call)

    def ask_each(self, call_for: Callable[[ServerAddress], Call[Any]]) -> None:
        """As `ask_all`, with a call of its own for each server."""

        def ask() -> dict[str, str]:
            return failures({each.name: self._calls.start(each, call_for(each)) for each in self.alive})

        self.fail(on_rank(0, ask))

    def begin(self) -> None:
        """Make the servers' weights loadable.

        A server that this run has given no weights yet may hold an update open that an earlier, killed run began: that
        is ended first, whatever it had loaded.
        """
        timeout_s = self._config.timeout_s

        async def begin_first(server: SglangServer) -> None:
            try:
                await server.begin_weight_update(timeout_s)
            except ServerRefusedError:
                await server.end_weight_update(timeout_s)
                await server.begin_weight_update(timeout_s)

        def call_for(address: ServerAddress) -> Call[Any]:
            is_first = address.policy_version < 0
            return begin_first if is_first else lambda server: server.begin_weight_update(timeout_s)

        self.ask_each(call_for)

    def end(self) -> None:
        """Make the loaded weights ready for use."""
        timeout_s = self._config.timeout_s
        self.ask_all(lambda server: server.end_weight_update(timeout_s))

    def publish(self, policy_version: int) -> None:
        """Let the servers forget what older weights computed, and say which version they have.

        With pause mode "in_place" running requests go on with the KV cache that they have, and nothing is forgotten.
        """
        timeout_s = self._config.timeout_s

        async def publish(server: SglangServer) -> None:
            if self._config.pause != "in_place":
                await server.flush_cache(timeout_s)
            await server.update_weight_version(policy_version, timeout_s)

        self.ask_all(publish)


def on_rank[T](rank: int, action: Callable[[], T]) -> T:
    """Do something on one rank and tell every rank its JSON-able result; collective."""
    return broadcast_json(action() if dist.get_rank() == rank else None, src=rank)  # type: ignore[no-any-return]
