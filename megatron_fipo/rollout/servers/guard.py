"""Stands between a server and its owner, so that neither leaves the other's processes behind.

`python -m megatron_fipo.rollout.servers.guard LOG COMMAND …` starts the command in a process group of its own and ends
that whole group, by SIGKILL at last, as soon as the command's first process has ended, or the owner: its end of this
process's input closes then, however it ended. Where this process itself is killed, the kernel kills the first process,
SGLang's others go with that one, and the owner kills the group. It needs the standard library alone.

The first line of its output is the process group. On a line of input it sends SIGTERM and gives the command that many
seconds. Its exit status is the command's, as a shell would say it.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2).
_libc = ctypes.CDLL(None)


def main(log: str, command: list[str]) -> int:
    """Run the command until it or the owner has ended; returns the exit status."""
    # Those that end a whole job by a signal reach the owner too, which then has this one end the server in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The server inherits this: what asks the trainer to save must not end it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    guard = os.getpid()

    def end_with_guard() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        if _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL) != 0 or os.getppid() != guard:
            os._exit(1)

    # The log has the server's key in it.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=descriptor,
        stderr=descriptor,
        process_group=0,
        preexec_fn=end_with_guard,
    )
    os.close(descriptor)
    try:
        with suppress(BrokenPipeError):
            os.write(1, b"%d\n" % server.pid)
        _wait(server)
    finally:
        # The first process is not waited for yet, so that the group cannot be another one of the same number.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    status = server.wait()
    return status if status >= 0 else 128 - status


def _wait(server: subprocess.Popen[bytes]) -> None:
    """Return when the group is to be killed."""
    poll = select.poll()
    descriptor = os.pidfd_open(server.pid)
    poll.register(descriptor, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    ready = {each for each, _ in poll.poll()}
    if descriptor in ready:
        return
    if line := os.read(0, 64).strip():
        server.send_signal(signal.SIGTERM)
        # The owner may end meanwhile.
        poll.poll(float(line) * 1e3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
