"""Exit statuses of `megatron-fipo`, which scripts and schedulers rely on."""

import signal

DONE = 0
"""The work is done."""

FAILED = 1
"""The work cannot go on; started again as it is, it would fail again."""

BAD_INPUT = 2
"""The command, the configuration or an input was bad; nothing has begun."""

GO_ON = 85
"""The work has come to an early end and goes on where the same command is started again."""

INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C; as `GO_ON`, but somebody is there who knows."""

TERMINATED = 128 + signal.SIGTERM
"""A second SIGTERM, or a first one to a command that keeps no state: it ended at once."""
