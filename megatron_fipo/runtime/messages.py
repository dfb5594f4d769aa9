"""Messages between processes: four bytes of length, then JSON in ASCII.

A lone surrogate, which a model may well write, travels as its escape.
"""

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size


def encode_message(message: Any) -> bytes:
    """Message → bytes."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def body_length(head: bytes) -> int:
    """Bytes that follow the first `LENGTH_BYTES`."""
    length: int = _LENGTH.unpack(head)[0]
    return length


def decode_body(body: bytes) -> Any:
    """What the bytes after the length say."""
    return json.loads(body)


async def read_message(reader: "asyncio.StreamReader") -> Any:
    """The next message.

    Raises:
        asyncio.IncompleteReadError: The other end is gone.
    """
    head = await reader.readexactly(LENGTH_BYTES)
    return decode_body(await reader.readexactly(body_length(head)))
