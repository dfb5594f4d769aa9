"""One SGLang server as the process that owns it sees it: start, wait until it is ready, watch, stop."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from megatron_fipo.rollout.servers import guard as guard_program

PROBE_INTERVAL_S = 0.2
STOP_GRACE_S = 5.0
"""Between SIGTERM and SIGKILL. SGLang lets running requests finish, which nobody waits for."""
_TAIL_BYTES, _TAIL_LINES, _LINE_LENGTH = 1 << 16, 25, 400
# SGLang writes all its arguments down, on a line of thousands of characters.
_KEY = re.compile(r"(api_key': )'[^']*'")


class ServerEndedError(Exception):
    """A server ended by itself, or did not become ready; the text has the end of its log."""


class ServerProcess:
    """A server's processes, which are one process group, and their guard.

    The group ends with this process, whatever ends it (`guard.py`).

    Args:
        guard: The guard.
        group: The process group; its leader is the server's first process.
        log: What the server writes.
    """

    def __init__(self, guard: asyncio.subprocess.Process, group: int, log: Path) -> None:
        self.guard = guard
        self.group = group
        self.log = log

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path) -> "ServerProcess":
        """Start a server and return at once.

        Args:
            command: Its command line.
            environment: All of its environment.
            log: Where its output goes; its folder must exist.

        Raises:
            ServerEndedError: The command cannot be run.
        """
        # Isolated, so that nothing on the server's PYTHONPATH gets into the guard.
        guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", guard_program.__file__, str(log), *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
        assert guard.stdout is not None
        group = await guard.stdout.readline()
        if not group:
            await guard.wait()
            raise ServerEndedError(f"{command[0]} cannot be started")
        return cls(guard, int(group), log)

    async def wait_ready(self, url: str, timeout_s: float) -> None:
        """Wait until the server answers that it is ready.

        Raises:
            ServerEndedError: It has ended, or is not ready in time.
        """
        ended = asyncio.ensure_future(self.wait())
        try:
            async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
                while not await _is_ready(session, url):
                    done, _ = await asyncio.wait([ended], timeout=PROBE_INTERVAL_S)
                    if done:
                        raise ServerEndedError(ended.result())
        except TimeoutError:
            raise ServerEndedError(f"was not ready within {timeout_s:g} s; {self._log_end()}") from None
        finally:
            ended.cancel()

    async def wait(self) -> str:
        """Wait until the server has ended, and kill what is left of it.

        Returns:
            How it ended, with the end of its log.
        """
        status = await self._wait_for_guard()
        # The guard has done so, unless it was killed itself.
        self._kill_group()
        return f"{_how(status)}; {self._log_end()}"

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End the server, by SIGTERM and after `grace_s` by SIGKILL, and wait until it is gone."""
        assert self.guard.stdin is not None
        with contextlib.suppress(ConnectionError):
            self.guard.stdin.write(b"%g\n" % grace_s)
            await self.guard.stdin.drain()
        try:
            async with asyncio.timeout(grace_s + STOP_GRACE_S):
                await self._wait_for_guard()
        except TimeoutError:
            # Stopped by SIGSTOP, for example.
            self.guard.kill()
            await self._wait_for_guard()
        self._kill_group()

    async def _wait_for_guard(self) -> int:
        assert self.guard.stdin is not None and self.guard.stdout is not None
        status = await self.guard.wait()
        # Lets go of the pipes.
        self.guard.stdin.close()
        await self.guard.stdout.read()
        return status

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)

    def _log_end(self) -> str:
        with self.log.open("rb") as file:
            begin = max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0)
            file.seek(begin)
            if begin:
                # The rest of a line, perhaps of its key.
                file.readline()
            lines = file.read().decode(errors="replace").splitlines()
        told = [_KEY.sub(r"\1…", line.rstrip())[:_LINE_LENGTH] for line in lines[-_TAIL_LINES:]]
        return "\n".join([f"the end of {self.log}:", *told]).rstrip()


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/ready", timeout=aiohttp.ClientTimeout(total=5.0)) as reply:
            return reply.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _how(status: int) -> str:
    """What an exit status of the guard says."""
    if status < 0:
        return f"its guard was killed ({signal.Signals(-status).name})"
    if status > 128:
        return f"was killed ({signal.Signals(status - 128).name})"
    return f"ended with status {status}"
