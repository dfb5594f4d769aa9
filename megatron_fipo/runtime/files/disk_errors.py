"""What a file system refuses to a run, told with what helps."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_fipo.runtime.errors import BreakdownError, CheckpointError, RunError

# A file where a folder should be, or the other way round, or links in a circle: that stays so.
_OF_ANOTHER_KIND = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ELOOP})


@contextmanager
def disk_errors_told(path: Path, what: str, kind: type[RunError] = CheckpointError) -> Iterator[None]:
    """Errors of the file system become one of the run, which names the place and what helps.

    Args:
        path: The place, where the error does not name one.
        what: What does not come about, as "cannot be written".
        kind: What they become.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or path}: {what} ({error.strerror or error}); {disk_way_out(error)}") from error


def disk_way_out(error: OSError) -> str:
    """What helps where something cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free some space" if full else "mend its permissions, or take another output_dir"


def size_text(num_bytes: float) -> str:
    """A size for people, such as "1.50 GiB" or "3 MiB"."""
    return f"{num_bytes / 1024**3:.2f} GiB" if num_bytes >= 1024**3 else f"{num_bytes / 1024**2:.0f} MiB"


MEND = "mend that, and start again"
"""The way out where nothing goes on without what cannot be read."""


@contextmanager
def read_errors_told(
    path: Path,
    kind: type[RunError] = CheckpointError,
    way_out: str = "mend that, or remove it to go on without it",
) -> Iterator[None]:
    """What cannot be read now is no damage: it ends the run, which tries again when it is started again.

    Args:
        path: The place, where the error does not name one.
        kind: Raised where a file is missing, or something else is in its place.
        way_out: What helps where the file system refuses.

    Raises:
        RunError: That is so.
        BreakdownError: The file system refuses.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{error.filename or path}: is missing") from error
    except OSError as error:
        if error.errno in _OF_ANOTHER_KIND:
            raise kind(f"{error.filename or path}: is something else ({error.strerror})") from error
        raise BreakdownError(
            f"{error.filename or path}: cannot be read ({error.strerror}), so nobody knows whether it is damaged; "
            f"{way_out}"
        ) from error
