"""Files of plain arrays, as NumPy writes them; nothing in them is unpickled."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A lone .npy file is an array, which is no context manager: a TypeError. Damaged headers ask for any amount of memory.
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    RuntimeError,
    LookupError,
    SyntaxError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


class ArrayFileError(Exception):
    """A file that cannot be read as plain arrays; the text says why."""


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of an .npz file.

    Raises:
        ArrayFileError: It is missing, damaged, something else, or has to be unpickled.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _DAMAGE as error:
        raise ArrayFileError(str(error)) from error
