"""The controller process's end of the line to rank 0: requests come in; answers, news and its own requests go out."""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from megatron_fipo.config.base import ConfigError
from megatron_fipo.parallel.agreement import describe
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.messages import encode_message, read_message
from megatron_fipo.trainer.shared_arrays import share_arrays

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a request led to.

    Attributes:
        value: Plain JSON values.
        arrays: Named arrays, which travel through shared memory.
    """

    value: Any = None
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


type Action = Callable[..., Awaitable[Answer]]


class ControllerService:
    """Answers rank 0's requests, several at once, until rank 0 is gone.

    Args:
        reader: Messages from rank 0.
        writer: Messages to rank 0.
        files: Takes the file descriptors of shared arrays to rank 0.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, files: socket.socket) -> None:
        self._reader, self._writer, self._files = reader, writer, files
        self._tasks: set[asyncio.Task[None]] = set()
        self._pushes: dict[int, asyncio.Future[Mapping[str, str] | None]] = {}
        self._num_pushes = 0

    @classmethod
    async def on_sockets(cls, line: int, files: int) -> "ControllerService":
        """A service on the sockets that rank 0 has handed over, given by their file descriptors."""
        for descriptor in (line, files):
            # What this process starts must not hold the line when this process has ended.
            os.set_inheritable(descriptor, False)
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=line))
        return cls(reader, writer, socket.socket(fileno=files))

    @property
    def is_awaited(self) -> bool:
        """Whether rank 0 waits for an answer, and so takes in news."""
        return bool(self._tasks)

    async def serve(self, actions: Mapping[str, Action]) -> None:
        """Answer requests until rank 0 closes its end; what has no answer then is cancelled.

        Args:
            actions: What each request does, called with the request's arguments.
        """
        try:
            while True:
                message = await read_message(self._reader)
                if "pushed" in message:
                    done = self._pushes.pop(message["pushed"])
                    if not done.cancelled():
                        done.set_result(message["failed"])
                    continue
                task = asyncio.create_task(self._answer(message["request"], actions[message["do"]], message["with"]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writer.transport.abort()
            self._files.close()

    def tell(self, news: str, *content: Any) -> None:
        """Send rank 0 something that it did not ask for, if it listens at the moment."""
        if self.is_awaited:
            self._send({"news": news, "content": content})

    async def request_push(self, servers: Sequence[Mapping[str, Any]]) -> Mapping[str, str] | None:
        """Have the trainer send its weights to some servers; rank 0 sees to it when it next waits for an answer.

        Args:
            servers: Their addresses.

        Returns:
            Why a server did not take them in, by its name; None where it was not done, because newer weights come.
        """
        self._num_pushes += 1
        done = self._pushes[self._num_pushes] = asyncio.get_running_loop().create_future()
        self._send({"push": self._num_pushes, "servers": servers})
        return await done

    async def _answer(self, number: int, action: Action, arguments: Mapping[str, Any]) -> None:
        try:
            self._give(number, await action(**arguments))
        except (ConfigError, RunError) as error:
            self._send({"answer": number, "error": describe(error)})
        except Exception as error:
            logger.exception("the controller failed")
            problem = f"the rollout controller failed, see above: {type(error).__name__}: {error}"
            self._send({"answer": number, "error": describe(RunError(problem))})

    def _give(self, number: int, answer: Answer) -> None:
        """Send an answer whole, or raise and have sent nothing."""
        if not answer.arrays:
            self._send({"answer": number, "value": answer.value, "layout": None})
            return
        descriptor, layout = share_arrays(answer.arrays)
        try:
            message = encode_message({"answer": number, "value": answer.value, "layout": layout})
            # Before the message, so that rank 0 finds it.
            socket.send_fds(self._files, [b"\0"], [descriptor])
        finally:
            os.close(descriptor)
        self._writer.write(message)

    def _send(self, message: Any) -> None:
        self._writer.write(encode_message(message))
