"""What becomes of work during which a stop is asked for."""

import asyncio

import pytest

from megatron_fipo.runtime.stop_request import StopRequest, StopRequested


def test_unfinished_work_is_broken_off() -> None:
    stop, ended = StopRequest(), []

    async def work() -> None:
        stop.ask("SIGTERM")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("broken off")

    with pytest.raises(StopRequested, match="SIGTERM"):
        asyncio.run(stop.or_work(work()))
    assert ended == ["broken off"]


def test_finished_work_keeps_its_result() -> None:
    stop = StopRequest()

    async def work() -> int:
        await asyncio.sleep(0)
        stop.ask("SIGTERM")
        return 3

    assert asyncio.run(stop.or_work(work())) == 3
    with pytest.raises(StopRequested):
        stop.raise_if_asked()
