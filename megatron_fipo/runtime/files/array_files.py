"""Files of plain arrays, as NumPy writes them; nothing in them is unpickled."""

import errno
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A lone .npy file is an array, which is no context manager: a TypeError.
_DAMAGE = (
    ValueError,
    EOFError,
    TypeError,
    RuntimeError,
    LookupError,
    SyntaxError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)


class ArrayFileError(Exception):
    """A file that cannot be read as plain arrays; the text says why."""


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of an .npz file.

    Raises:
        ArrayFileError: It is damaged, something else, or has to be unpickled.
        OSError: It is missing or cannot be read, which says nothing of what is in it.
        MemoryError: There is not enough for it, which says as little.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _DAMAGE as error:
        raise ArrayFileError(str(error)) from error
    except OSError as error:
        # NumPy's own have no number, and damage sends its reader to places before the file's beginning.
        if error.errno in (None, errno.EINVAL):
            raise ArrayFileError(str(error)) from error
        raise
    except MemoryError as error:
        if _num_bytes_asked(error) > path.stat().st_size:
            raise ArrayFileError(str(error)) from error
        raise


def _num_bytes_asked(error: MemoryError) -> int:
    """Size of the array that had no room, which a damaged header may have made up; 0 where it was something else."""
    match error.args:
        case (tuple() as shape, np.dtype() as dtype):
            return math.prod(shape) * dtype.itemsize
    return 0
