"""A connection of every rank to rank 0, beside the collectives, for what must get through while these hang.

Messages are JSON, and rank 0 asks for a token of the job's own. The kernel closes a connection with its process,
however that ends, so that the death of a rank is known at once.
"""

import asyncio
import hmac
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.runtime.messages import LENGTH_BYTES, body_length, decode_body, encode_message, read_message

# A node that is gone closes nothing; a stopped process's node still acknowledges.
_UNANSWERED_MS = 30_000
_HELLO_S = 30.0
_CLOSE_S = 1.0
_MOST_HELLO_BYTES = 4096


@dataclass(slots=True, kw_only=True)
class Peer:
    """Another rank, as rank 0 sees it.

    Attributes:
        rank: The rank.
        host: Its node.
        process: Its process there.
        writer: The line to it.
        heard_at: When it was heard of, in the loop's seconds.
        changed_at: When its progress changed.
        where: What it told last of where it is.
        answer: What it told when asked what it does.
        has_left: Whether it has said that it leaves.
    """

    rank: int
    host: str
    process: int
    writer: asyncio.StreamWriter
    heard_at: float
    changed_at: float
    where: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    has_left: bool = False

    @property
    def name(self) -> str:
        """The rank, and where it runs."""
        return f"rank {self.rank} ({self.host}, process {self.process})"


class Hub:
    """Rank 0's end.

    Args:
        hear: Called with every message.
        lose: Called when a connection has ended.

    Attributes:
        peers: All ranks that have come, by rank.
    """

    def __init__(self, hear: Callable[[Peer, Mapping[str, Any]], None], lose: Callable[[Peer], None]) -> None:
        self._hear, self._lose = hear, lose
        self._token = secrets.token_hex(16)
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[Any]] = set()
        self.peers: dict[int, Peer] = {}

    async def open(self, host: str) -> dict[str, Any]:
        """Listen at an address; returns what the others need to `connect`."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        name = {"name": socket.gethostname(), "process": os.getpid()}
        return {"host": host, "port": self._server.sockets[0].getsockname()[1], "token": self._token, **name}

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell all that are still there; returns at once."""
        encoded = encode_message(message)
        for peer in self.peers.values():
            if not peer.writer.is_closing():
                peer.writer.write(encoded)

    def wake(self) -> None:
        """Let ranks go on that were stopped (SIGSTOP), as far as they are on this node: they are to hear something."""
        for peer in self.peers.values():
            if not peer.writer.is_closing():
                _wake(peer.host, peer.process)

    async def close(self, patience_s: float = 0.0) -> None:
        """Wait a while for the others to close their ends, then close this one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for peer in self.peers.values():
                    with suppress(OSError):
                        await peer.writer.drain()
                while any(not peer.writer.is_closing() for peer in self.peers.values()):
                    await asyncio.sleep(0.02)
        if self._server is not None:
            self._server.close()
        for peer in self.peers.values():
            peer.writer.close()
        if self._serving:
            await asyncio.wait(self._serving, timeout=_CLOSE_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = await _read_hello(reader)
        except (OSError, ValueError, EOFError, TimeoutError):
            hello = {}
        if not hmac.compare_digest(str(hello.get("token", "")), self._token):
            writer.close()
            return
        _give_up_silence(writer)
        now = asyncio.get_running_loop().time()
        peer = Peer(
            rank=hello["rank"],
            host=hello["host"],
            process=hello["process"],
            writer=writer,
            heard_at=now,
            changed_at=now,
        )
        self.peers[peer.rank] = peer
        task = asyncio.current_task()
        assert task is not None, "streams run it as one"
        self._serving.add(task)
        with suppress(OSError, EOFError):
            while True:
                self._hear(peer, await read_message(reader))
        writer.close()
        self._serving.discard(task)
        self._lose(peer)


class Line:
    """Another rank's end.

    Args:
        hear: Called with every message.
        lose: Called when the connection has ended.

    Attributes:
        hub_name: Rank 0, and where it runs.
    """

    def __init__(self, hear: Callable[[Mapping[str, Any]], None], lose: Callable[[], None]) -> None:
        self._hear, self._lose = hear, lose
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._hub = ("", 0)
        self.hub_name = "rank 0"

    async def connect(self, address: Mapping[str, Any], rank: int) -> None:
        """Join rank 0.

        Args:
            address: What `Hub.open` gave.
            rank: This rank.

        Raises:
            OSError: It cannot be reached.
        """
        async with asyncio.timeout(_HELLO_S):
            reader, self._writer = await asyncio.open_connection(address["host"], address["port"])
        self._hub = address["name"], address["process"]
        self.hub_name = "rank 0 ({}, process {})".format(*self._hub)
        _give_up_silence(self._writer)
        self.send({"token": address["token"], "rank": rank, "host": socket.gethostname(), "process": os.getpid()})
        self._reading = asyncio.ensure_future(self._read(reader))

    @property
    def is_open(self) -> bool:
        """Whether rank 0 can be told something."""
        return self._writer is not None and not self._writer.is_closing()

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell rank 0 something, if it is there; returns at once."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_message(message))

    def wake(self) -> None:
        """Let rank 0 go on where it was stopped, if it is on this node."""
        if self.is_open:
            _wake(*self._hub)

    async def close(self) -> None:
        """Close this end, once all is sent."""
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._writer.drain()
            self._writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError, EOFError):
            while True:
                self._hear(await read_message(reader))
        assert self._writer is not None
        self._writer.close()
        self._lose()


async def _read_hello(reader: asyncio.StreamReader) -> Mapping[str, Any]:
    """A first message; whoever sends it is not known yet."""
    async with asyncio.timeout(_HELLO_S):
        size = body_length(await reader.readexactly(LENGTH_BYTES))
        if size > _MOST_HELLO_BYTES:
            raise ValueError("too long")
        hello = decode_body(await reader.readexactly(size))
    return hello if isinstance(hello, dict) else {}


def _wake(host: str, process: int) -> None:
    """Let a process go on, on this node; one that runs does not notice."""
    if host == socket.gethostname():
        with suppress(OSError):
            os.kill(process, signal.SIGCONT)


def _give_up_silence(writer: asyncio.StreamWriter) -> None:
    """Have the kernel end a connection whose other node does not acknowledge what is sent."""
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
