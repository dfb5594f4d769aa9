import asyncio

import pytest

from megatron_fipo.runtime.background import running


def test_an_error_is_logged_at_once_and_raised_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("by zero")

    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):
            async with running(fail()):
                for _ in range(3):
                    await asyncio.sleep(0)
                assert "ZeroDivisionError: by zero" in caplog.text

    asyncio.run(scenario())


def test_what_runs_ends_quietly_with_the_context(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(asyncio.Event().wait()):  # type: ignore[arg-type]
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
    assert not caplog.records
