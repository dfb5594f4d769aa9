"""A server's processes, in whose place a small HTTP server stands: none is left, whatever is killed."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_fipo.rollout.servers.process import ServerEndedError, ServerProcess
from tests.process_groups import members, wait_until_empty

STAND_IN = Path(__file__).parents[3] / "stand_in_sglang" / "sglang" / "launch_server.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def command(port: int) -> list[str]:
    return [sys.executable, str(STAND_IN), "--port", str(port)]


async def start(folder: Path, port: int, **variables: str) -> ServerProcess:
    return await ServerProcess.start(command(port), {**os.environ, **variables}, folder / "log")


def test_a_server_starts_answers_and_stops(tmp_path: Path) -> None:
    async def scenario() -> int:
        port = free_port()
        server = await start(tmp_path, port)
        await server.wait_ready(f"http://127.0.0.1:{port}", 30.0)
        assert len(members(server.group)) == 2
        await server.stop()
        assert await server.wait() == f"was killed (SIGTERM); the end of {server.log}:\nthe stand-in starts"
        return server.group

    wait_until_empty(asyncio.run(scenario()))
    # A server's log may have its key.
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_one_that_ends_before_it_is_ready_says_why_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        fails = [sys.executable, "-c", "print('bad weights'); raise SystemExit(3)"]
        server = await ServerProcess.start(fails, os.environ, tmp_path / "log")
        with pytest.raises(ServerEndedError, match=r"ended with status 3; the end of .*log:\nbad weights"):
            await server.wait_ready(f"http://127.0.0.1:{free_port()}", 1000.0)

    asyncio.run(scenario())


def test_the_end_of_its_log_does_not_tell_its_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        says = "print({'api_key': 'secret', 'long': 1000 * 'x'}); print('bad weights')"
        server = await ServerProcess.start([sys.executable, "-c", says], os.environ, tmp_path / "log")
        told = (await server.wait()).splitlines()
        assert told[1].startswith("{'api_key': …, 'long': 'xxx") and len(told[1]) == 400
        assert told[2:] == ["bad weights"]

    asyncio.run(scenario())


def test_of_a_long_log_its_end_alone_is_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        says = "for number in range(20): print(number, 9995 * 'x')"
        server = await ServerProcess.start([sys.executable, "-c", says], os.environ, tmp_path / "log")
        # Whole lines of the last 64 KiB.
        assert [line.split()[0] for line in (await server.wait()).splitlines()[1:]] == [str(n) for n in range(14, 20)]

    asyncio.run(scenario())


def test_one_that_is_not_ready_in_time_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        port = free_port()
        server = await start(tmp_path, port, STAND_IN_DELAY_S="1000")
        with pytest.raises(ServerEndedError, match=r"was not ready within 0\.5 s"):
            await server.wait_ready(f"http://127.0.0.1:{port}", 0.5)
        await server.stop()

    asyncio.run(scenario())


def test_a_command_that_does_not_exist_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ServerEndedError, match="no-such-program cannot be started"):
            await ServerProcess.start(["no-such-program"], os.environ, tmp_path / "log")

    asyncio.run(scenario())


@pytest.mark.parametrize("victim", ["first process", "guard"])
def test_nothing_is_left_when_a_part_is_killed(tmp_path: Path, victim: str) -> None:
    async def scenario() -> int:
        port = free_port()
        server = await start(tmp_path, port)
        await server.wait_ready(f"http://127.0.0.1:{port}", 30.0)
        os.kill(server.group if victim == "first process" else server.guard.pid, signal.SIGKILL)
        how = "its guard was killed" if victim == "guard" else "was killed"
        assert (await server.wait()).startswith(f"{how} (SIGKILL); ")
        return server.group

    wait_until_empty(asyncio.run(scenario()))


def test_a_stopped_guard_does_not_keep_a_server_alive(tmp_path: Path) -> None:
    async def scenario() -> int:
        port = free_port()
        server = await start(tmp_path, port)
        await server.wait_ready(f"http://127.0.0.1:{port}", 30.0)
        os.kill(server.guard.pid, signal.SIGSTOP)
        await server.stop(grace_s=0.1)
        return server.group

    wait_until_empty(asyncio.run(scenario()))


def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import asyncio, os
        from pathlib import Path
        from megatron_fipo.rollout.servers.process import ServerProcess

        async def own():
            server = await ServerProcess.start({command(free_port())!r}, os.environ, Path({str(tmp_path)!r}) / "log")
            print(server.group, flush=True)
            await server.wait()

        asyncio.run(own())
        """
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    group = int(owner.stdout.readline())
    assert members(group)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until_empty(group)
