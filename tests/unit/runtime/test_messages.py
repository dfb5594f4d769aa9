import asyncio

import pytest

from megatron_fipo.runtime.messages import encode_message, read_message


async def read_all(content: bytes) -> list[object]:
    reader = asyncio.StreamReader()
    reader.feed_data(content)
    reader.feed_eof()
    messages = []
    while not reader.at_eof():
        messages.append(await read_message(reader))
    return messages


def test_messages_come_out_as_they_went_in() -> None:
    messages = [{"text": "a\ud800b\n"}, [], None, {"numbers": [1, 2.5]}, "x" * 70_000]
    assert asyncio.run(read_all(b"".join(map(encode_message, messages)))) == messages


def test_half_a_message_is_no_message() -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        asyncio.run(read_all(encode_message({"a": 1})[:-1]))
