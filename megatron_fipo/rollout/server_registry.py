"""The controller's side of the servers: who is there, who left, and orders to the node agents that own them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLife:
    """A server from the moment it is ready until it ends; its successor is another life with another name.

    Attributes:
        name: Names this life, as in "node0.server1.life2".
        url: Where it answers, such as http://10.1.0.7:30000.
        tensor_parallel_size: Its ranks.
        may_restart: Whether `ServerPool.restart` can give it a successor; false for a server that was attached to.
    """

    name: str
    url: str
    tensor_parallel_size: int
    may_restart: bool


class ServerPool(Protocol):
    """Where the engine gets its servers from. All of it belongs to one event loop."""

    @property
    def api_key(self) -> str | None:
        """What the servers ask for in `Authorization: Bearer …`; None where they ask for nothing."""
        ...

    @property
    def lives(self) -> Sequence[ServerLife]:
        """Servers that are ready, in an order that restarts do not change.

        Each has the model folder's weights at first, one that was attached to whatever it had. A server leaves as
        soon as its process, its node's agent, or the connection to that agent has ended.
        """
        ...

    @property
    def num_coming(self) -> int:
        """Servers that are being started, restarted, or waited for."""
        ...

    async def wait_for_change(self, known: Sequence[ServerLife], known_coming: int) -> None:
        """Return as soon as `lives` or `num_coming` differ from what the caller knows; at once if they do already.

        Raises:
            RunError: No server is left and none will come; the text says what became of them.
        """
        ...

    async def restart(self, name: str, reason: str) -> None:
        """End a life that does not answer, or has wrong weights; it leaves `lives` before this returns.

        Its successor comes by itself, unless the server was restarted too often or was attached to: then the run goes
        on without it. A life that is gone already is left alone.

        Args:
            name: The life.
            reason: For the log, and for the error where no server is left.
        """
        ...

    async def close(self) -> None:
        """End all servers that this run started, and wait for that."""
        ...
