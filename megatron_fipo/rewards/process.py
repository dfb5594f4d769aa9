"""A grading process as its parent sees it."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.runtime.child_process import child_environment
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.messages import encode_message, read_message

START_TIMEOUT_S = 120.0
"""Imports from a cold network file system are slow."""

_ENVIRONMENT = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")},
    "CUDA_VISIBLE_DEVICES": "",
    # The order of sets must not change a verdict from run to run.
    "PYTHONHASHSEED": "0",
}


type Doing = tuple[str, str] | None
"""(kind, term) that a process is busy with, where it has said so; the kind is "term" or "reference"."""


class ProcessEndedError(Exception):
    """A grading process ended or had to be ended.

    Attributes:
        hung: It was past its deadline.
        idle: It had no job.
    """

    def __init__(self, hung: bool = False, idle: bool = False) -> None:
        super().__init__(hung, idle)
        self.hung, self.idle = hung, idle


@dataclass(slots=True)
class GradingProcess:
    """A grading process; all of it belongs to one event loop.

    Attributes:
        process: The process.
        doing: What it announced last about its current job.
    """

    process: asyncio.subprocess.Process
    doing: Doing = None

    @classmethod
    async def start(cls, settings: dict[str, Any]) -> "GradingProcess":
        """Start one, and wait until it can grade.

        The kernel ends it with the *thread* that starts it, which must stay.

        Args:
            settings: What `Grader` takes, and `memory_bytes`.

        Raises:
            ConfigError: A term cannot be used.
            RunError: It ended or did not answer.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-W", "ignore", "-m", "megatron_fipo.rewards.worker", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,
            env=child_environment(**_ENVIRONMENT),
        )
        started = cls(process)
        try:
            await started.send(settings, START_TIMEOUT_S)
            reply = await started.receive(lambda doing: START_TIMEOUT_S)
            if "refused" in reply:
                raise ConfigError(*reply["refused"])
        except ProcessEndedError as error:
            await started.end()
            how = f"did not answer in {START_TIMEOUT_S:g} s" if error.hung else f"ended with {process.returncode}"
            raise RunError(
                f"a grading process {how} before its first job; its messages are above; a small "
                f"reward.worker_memory_gib ({settings['memory_bytes'] / 1024**3:g}) is one possible reason"
            ) from error
        except BaseException:
            await started.end()
            raise
        return started

    @property
    def is_running(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self.process.returncode is None

    async def send(self, message: Any, timeout_s: float) -> None:
        """Send a message.

        Raises:
            ProcessEndedError: It has ended, or does not take the message in time.
        """
        assert self.process.stdin is not None
        try:
            async with asyncio.timeout(timeout_s):
                self.process.stdin.write(encode_message(message))
                await self.process.stdin.drain()
        except (ConnectionError, TimeoutError) as error:
            raise ProcessEndedError(isinstance(error, TimeoutError)) from error

    async def receive(self, patience_s: Callable[[Doing], float]) -> Any:
        """The next message, after those that announce what it does; each of them starts its time again.

        Args:
            patience_s: How long it may be silent, by what it does.

        Raises:
            ProcessEndedError: It has ended, or is silent for too long.
        """
        assert self.process.stdout is not None
        self.doing = None
        while True:
            try:
                async with asyncio.timeout(patience_s(self.doing)):
                    message = await read_message(self.process.stdout)
            except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
                raise ProcessEndedError(isinstance(error, TimeoutError)) from error
            if "at" not in message:
                return message
            self.doing = (message["at"][0], message["at"][1])

    async def end(self) -> None:
        """Kill it, if it still runs, with what a user's function has forked, and wait for its end."""
        # What still holds the pipes would be waited for.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
