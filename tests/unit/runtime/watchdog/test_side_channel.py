import asyncio
import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_fipo.runtime.watchdog.side_channel import Hub, Line, Peer


class Ends:
    """Both ends, and what they heard."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[tuple[int, Mapping[str, Any]]] = asyncio.Queue()
        self.lost: asyncio.Queue[int] = asyncio.Queue()
        self.told: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self.hub_lost = asyncio.Event()
        self.hub = Hub(lambda peer, message: self.heard.put_nowait((peer.rank, message)), self._lose)

    def _lose(self, peer: Peer) -> None:
        self.lost.put_nowait(peer.rank)

    async def join(self, address: Mapping[str, Any], rank: int) -> Line:
        line = Line(self.told.put_nowait, self.hub_lost.set)
        await line.connect(address, rank)
        return line


def test_ranks_and_rank_0_hear_each_other_and_each_others_ends() -> None:
    async def talk() -> None:
        ends = Ends()
        address = await ends.hub.open("127.0.0.1")
        first, second = await ends.join(address, 1), await ends.join(address, 2)
        assert first.hub_name == f"rank 0 ({socket.gethostname()}, process {os.getpid()})"
        first.send({"a": 1})
        assert await ends.heard.get() == (1, {"a": 1})
        second.send({"b": 2})
        assert await ends.heard.get() == (2, {"b": 2})
        ends.hub.send({"c": 3})
        assert [await ends.told.get(), await ends.told.get()] == [{"c": 3}, {"c": 3}]
        await first.close()
        assert await ends.lost.get() == 1
        # What is said to a rank that is gone is lost, and to the others is not.
        ends.hub.send({"d": 4})
        assert await ends.told.get() == {"d": 4}
        await ends.hub.close()
        await ends.hub_lost.wait()
        assert not second.is_open

    asyncio.run(talk())


@pytest.mark.parametrize(
    "first_words",
    [
        json.dumps({"token": "guessed", "rank": 1, "host": "here", "process": 1}).encode(),
        json.dumps({"rank": 1}).encode(),
        b"[1]",
        b"no JSON",
        b" " * 5000,
    ],
    ids=["wrong token", "no token", "no object", "no JSON", "too long"],
)
def test_whoever_has_not_the_token_is_shown_the_door(first_words: bytes) -> None:
    async def knock() -> None:
        ends = Ends()
        address = await ends.hub.open("127.0.0.1")
        reader, writer = await asyncio.open_connection(address["host"], address["port"])
        writer.write(struct.pack(">I", len(first_words)) + first_words)
        assert await reader.read() == b""
        assert not ends.hub.peers
        writer.close()
        await ends.hub.close()

    asyncio.run(knock())
