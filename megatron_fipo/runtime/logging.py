"""Log lines of a run: one format, who speaks in front, upstream chatter turned down."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_UPSTREAM = ("megatron", "transformers", "torch", "filelock", "asyncio", "nv_one_logger", "root")


def setup_logging(speaker: int | str, level: int = logging.INFO) -> None:
    """Write log lines to stderr: everything from rank 0, controller and agents, warnings from the other ranks.

    Args:
        speaker: Global rank, or what another process is called; shown in every line.
        level: Lowest level of this package's own lines that all but the other ranks show.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(line_format(speaker))
    own = own_logger()
    own.handlers[:] = [handler]
    own.setLevel(logging.WARNING if isinstance(speaker, int) and speaker > 0 else level)
    own.propagate = False
    quiet_upstream()


def own_logger() -> logging.Logger:
    """The logger above all of this package's."""
    return logging.getLogger("megatron_fipo")


def line_format(speaker: int | str) -> logging.Formatter:
    """How a log line of a rank looks, or of a process that has a name."""
    name = f"rank {speaker}" if isinstance(speaker, int) else speaker
    return logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s", "%H:%M:%S")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep what libraries say while they are imported (about optional packages that are missing) off the screen."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def quiet_upstream() -> None:
    """Show errors alone of the libraries below: their start-up chatter hides this run's own lines."""
    for name in _UPSTREAM:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)(\..*)?")
