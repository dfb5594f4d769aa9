"""A proxy before a server that spoils some answers of /generate, each in a way drawn from a seed."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

FAULTS = (
    "drop_request",
    "drop_answer",
    "cut_connection",
    "status_500",
    "status_503",
    "truncated_json",
    "missing_log_prob",
    "missing_token",
    "other_token",
    "foreign_token",
    "no_number",
    "earlier_answer",
    "answer_twice",
    "late",
    "never",
    "old_version",
    "garbage",
    "no_http",
)


class MisbehavingProxy:
    """Answers on a port of its own for one server.

    Attributes:
        url: Where it answers.
        faults: How often each fault happened.
        commands: Path and body of what was asked, but for requests.
    """

    def __init__(self, upstream: str, seed: int, rate: float, num_faults: int, kinds: Sequence[str] = FAULTS) -> None:
        self.upstream, self.rate, self.kinds, self.num_left = upstream, rate, kinds, num_faults
        self.url = ""
        self.faults: Counter[str] = Counter()
        self.commands: list[tuple[str, bytes]] = []
        self.closing = asyncio.Event()
        self._draws = random.Random(seed)
        self._earlier = b""
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request by request."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            async with aiohttp.ClientSession() as session:
                while (head := await reader.readuntil(b"\r\n\r\n")) and await self._one(head, reader, writer, session):
                    pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, aiohttp.ClientError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def close(self) -> None:
        """End all connections."""
        self.closing.set()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _one(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: aiohttp.ClientSession
    ) -> bool:
        """Pass a request on, and its answer back; whether the connection goes on."""
        method, path, _ = head.decode().split(" ", 2)
        told = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.decode().split("\r\n")[1:])
        }
        body = await reader.readexactly(int(told.get("content-length", 0)))
        if path != "/generate":
            self.commands.append((path, body))
        fault = self._draw() if path == "/generate" else ""
        if fault == "drop_request":
            return False
        headers = {name: told[name] for name in ("content-type", "authorization") if name in told}
        async with session.request(method, self.upstream + path, data=body or None, headers=headers) as response:
            status, answer = response.status, await response.read()
        return await self._send(writer, fault, status, answer)

    def _draw(self) -> str:
        if self.num_left and self._draws.random() < self.rate:
            self.num_left -= 1
            # Each of those costs the time that a request may take.
            kinds = [kind for kind in self.kinds if kind != "never" or not self.faults["never"]]
            fault = self._draws.choice(kinds)
            self.faults[fault] += 1
            return fault
        return ""

    async def _send(self, writer: asyncio.StreamWriter, fault: str, status: int, answer: bytes) -> bool:
        """Write an answer, spoiled; whether the connection goes on."""
        good, answer, status = answer, *self._spoil(fault, answer, status)
        if fault == "late":
            await asyncio.sleep(self._draws.uniform(0.0, 0.2))
        if fault == "never":
            await self.closing.wait()
        if fault in ("drop_answer", "never"):
            return False
        whole = b"HTTP/1.1 %d Told\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            status,
            len(answer),
            answer,
        )
        if fault == "cut_connection":
            whole = whole[: self._draws.randrange(1, len(whole))]
        if fault == "no_http":
            whole = self._draws.randbytes(100)
        writer.write(whole * 2 if fault == "answer_twice" else whole)
        await writer.drain()
        if not fault and status == 200 and b"output_ids" in good:
            self._earlier = good
        return fault not in ("cut_connection", "no_http")

    def _spoil(self, fault: str, answer: bytes, status: int) -> tuple[bytes, int]:
        if fault.startswith("status_"):
            return b"Internal Server Error", int(fault.removeprefix("status_"))
        if fault == "truncated_json":
            return answer[: self._draws.randrange(len(answer))], status
        if fault == "garbage":
            return self._draws.randbytes(len(answer)), status
        if fault == "earlier_answer":
            return self._earlier or b"{}", status
        spoil = getattr(self, f"_{fault}", None)
        if spoil is None or status != 200:
            return answer, status
        told = orjson.loads(answer)
        spoil(told, told["meta_info"]["output_token_logprobs"])
        return orjson.dumps(told), status

    def _missing_log_prob(self, told: Any, entries: list[Any]) -> None:
        entries.pop(self._draws.randrange(len(entries)))

    def _missing_token(self, told: Any, entries: list[Any]) -> None:
        told["output_ids"].pop()

    def _other_token(self, told: Any, entries: list[Any]) -> None:
        told["output_ids"][self._draws.randrange(len(entries))] += 1

    def _foreign_token(self, told: Any, entries: list[Any]) -> None:
        place = self._draws.randrange(len(entries))
        told["output_ids"][place] = entries[place][1] = 1 << 20

    def _no_number(self, told: Any, entries: list[Any]) -> None:
        entries[self._draws.randrange(len(entries))][0] = None

    def _old_version(self, told: Any, entries: list[Any]) -> None:
        told["meta_info"]["weight_versions"] = [{"version": "default", "start": 0, "end": len(entries)}]


@asynccontextmanager
async def misbehaving(
    upstream: str, seed: int, rate: float, num_faults: int, kinds: Sequence[str] = FAULTS
) -> AsyncIterator[MisbehavingProxy]:
    """A proxy before a server."""
    proxy = MisbehavingProxy(upstream, seed, rate, num_faults, kinds)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
