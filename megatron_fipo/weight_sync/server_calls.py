"""Calls to several servers at once, from code that waits for them while it does something else."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError

import aiohttp

from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.sglang.client import ServerError, SglangServer, open_session

# More than the calls that weight synchronisation has under way with all servers.
_MAX_REQUESTS = 512

type Call[T] = Callable[[SglangServer], Awaitable[T]]


class ServerCalls:
    """Speaks to servers on an event loop in a thread of its own, which begins with the first call.

    Args:
        api_key: Key that the servers ask for; None where they ask for none.
    """

    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None

    def start[T](self, server: ServerAddress, call: Call[T]) -> Future[T]:
        """Begin a call and return at once.

        Args:
            server: The server.
            call: What to ask it; has a deadline of its own.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="weight sync calls", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(self._ask(server.url, call), self._loop)

    def start_all[T](self, servers: Sequence[ServerAddress], call: Call[T]) -> dict[str, Future[T]]:
        """Begin the same call to every server; the replies by the servers' names."""
        return {server.name: self.start(server, call) for server in servers}

    def close(self) -> None:
        """Close connections and end the thread."""
        if self._loop is None:
            return
        if self._session is not None:
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = self._session = None

    async def _ask[T](self, url: str, call: Call[T]) -> T:
        if self._session is None:
            self._session = open_session(self._api_key, _MAX_REQUESTS)
        return await call(SglangServer(url, self._session))


def failures[T](replies: Mapping[str, Future[T]], timeout_s: float | None = None) -> dict[str, str]:
    """Wait for replies, and say of which servers they are missing or bad.

    Args:
        replies: By the servers' names.
        timeout_s: How long to wait for all of them; then what is under way is given up. None: until they end.

    Returns:
        What went wrong, by name; nothing for servers that did as asked.
    """
    wait(replies.values(), timeout=timeout_s)
    found: dict[str, str] = {}
    for name, reply in replies.items():
        try:
            reply.result(timeout=0)
        except ServerError as error:
            found[name] = str(error)
        except FutureTimeoutError:
            reply.cancel()
            found[name] = f"no answer in {timeout_s:g} s"
    return found
