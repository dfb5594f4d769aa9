"""Log lines of a run: one format, the rank in front, upstream chatter turned down."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_UPSTREAM = ("megatron", "transformers", "torch", "filelock", "asyncio", "nv_one_logger", "root")


def setup_logging(rank: int, level: int = logging.INFO) -> None:
    """Write log lines to stderr: everything from rank 0, warnings from the others.

    Args:
        rank: Global rank, shown in every line.
        level: Lowest level that rank 0 shows of this package's own lines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(line_format(rank))
    own = own_logger()
    own.handlers[:] = [handler]
    own.setLevel(level if rank == 0 else logging.WARNING)
    own.propagate = False
    quiet_upstream()


def own_logger() -> logging.Logger:
    """The logger above all of this package's."""
    return logging.getLogger("megatron_fipo")


def line_format(rank: int) -> logging.Formatter:
    """How a log line of a rank looks."""
    return logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S")


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
