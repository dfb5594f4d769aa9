"""Rank 0's end of the line to the controller process."""

import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, Protocol

from megatron_fipo.parallel.collectives import Arrays
from megatron_fipo.runtime.child_process import child_environment
from megatron_fipo.runtime.errors import BreakdownError
from megatron_fipo.runtime.messages import LENGTH_BYTES, body_length, decode_body, encode_message
from megatron_fipo.trainer.shared_arrays import map_arrays

CONTROLLER_MODULE = "megatron_fipo.trainer.controller_process"
# What launchers tell a rank of itself; the controller is none.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PART_BYTES = 1 << 20
_CLOSE_PATIENCE_S = 90.0
_LAST_WORDS_S = 1.0


class HasFileno(Protocol):
    """What can be polled."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...


class ControllerEndedError(BreakdownError):
    """The controller process is gone."""


class ControllerLink:
    """A controller process, and the line to it: messages both ways, and whole arrays from it.

    The process is started by plain exec, in a session of its own, so that a Ctrl-C reaches this one alone. It ends
    gracefully as soon as this end of the line is closed, also by a crash of this process. What it and its children
    write to their output comes out of this process's `sys.stderr`, line by line: under a live view that is the screen.

    Args:
        module: What it runs.
    """

    def __init__(self, module: str = CONTROLLER_MODULE) -> None:
        self._line, theirs = socket.socketpair()
        self._files, their_files = socket.socketpair()
        self._received = bytearray()
        environment = child_environment()
        for name in _RANK_VARIABLES:
            environment.pop(name, None)
        with theirs, their_files:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(their_files.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), their_files.fileno()),
                start_new_session=True,
                env=environment,
            )
        assert self.process.stdout is not None
        self._voice = threading.Thread(
            target=_pass_on, args=(self.process.stdout,), name="controller's output", daemon=True
        )
        self._voice.start()

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            ControllerEndedError: The process is gone.
        """
        try:
            self._line.sendall(encode_message(message))
        except OSError as error:
            raise self._ended() from error

    def receive(self, timeout_s: float, or_readable: HasFileno | None = None) -> Any:
        """The next message; None where there was none in time, or before something else became readable.

        Raises:
            ControllerEndedError: The process is gone.
        """
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        if or_readable is not None:
            poll.register(or_readable, select.POLLIN)
        while (message := self._whole_message()) is None:
            ready = [descriptor for descriptor, _ in poll.poll(max(deadline - time.monotonic(), 0.0) * 1000)]
            if self._line.fileno() not in ready:
                return None
            try:
                part = self._line.recv(_PART_BYTES)
            except OSError:
                part = b""
            if not part:
                raise self._ended()
            self._received += part
        return message

    def receive_arrays(self, layout: Sequence[Sequence[Any]]) -> Arrays:
        """The arrays that belong to a message, which has their layout.

        Raises:
            ControllerEndedError: The process is gone.
        """
        _, descriptors, _, _ = socket.recv_fds(self._files, 1, 1)
        if not descriptors:
            raise self._ended()
        return map_arrays(descriptors[0], layout)

    def close(self) -> None:
        """End the process, with all that it started, and wait for that."""
        self._line.close()
        self._files.close()
        try:
            self.process.wait(_CLOSE_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._voice.join(_LAST_WORDS_S)

    def _whole_message(self) -> Any:
        if len(self._received) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + body_length(bytes(self._received[:LENGTH_BYTES]))
        if len(self._received) < end:
            return None
        message = decode_body(bytes(self._received[LENGTH_BYTES:end]))
        del self._received[:end]
        return message

    def _ended(self) -> ControllerEndedError:
        try:
            status = self.process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            return ControllerEndedError("the rollout controller has closed its line; its messages are above")
        # Children that have outlived it may hold its output open.
        self._voice.join(_LAST_WORDS_S)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ControllerEndedError(
            f"the rollout controller (process {self.process.pid}) {how}; its messages, if any, are above"
        )


def _pass_on(output: IO[bytes]) -> None:
    """Write lines to whatever `sys.stderr` is at the moment, to the end of the output."""
    with output:
        for line in output:
            # It may be closed, or a terminal that is gone.
            with suppress(OSError, ValueError):
                sys.stderr.write(line.decode(errors="replace"))
                sys.stderr.flush()
