"""Arrays from one process to another through memory that both map.

The memory is a file without a name, which the kernel frees once nobody holds it: there is nothing to clean up after a
crash, and only who is handed the file descriptor can read it.
"""

import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fipo.parallel.collectives import Arrays

_ALIGNMENT = 64

type Layout = list[tuple[str, str, list[int], int]]
"""(name, NumPy type, shape, first byte) of every array."""


def share_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[int, Layout]:
    """Copy arrays into memory that can be handed to another process.

    Returns:
        File descriptor of the memory, which the caller closes, and what lies where in it, which can be written as JSON.
    """
    layout: Layout = []
    size = 0
    for name, array in arrays.items():
        layout.append((name, array.dtype.str, list(array.shape), size))
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    descriptor = os.memfd_create("megatron_fipo", os.MFD_CLOEXEC)
    # An empty file cannot be mapped.
    os.ftruncate(descriptor, max(size, 1))
    memory = mmap.mmap(descriptor, max(size, 1))
    for place, array in _views(memory, layout).items():
        np.copyto(array, arrays[place])
    return descriptor, layout


def map_arrays(descriptor: int, layout: Sequence[Sequence[Any]]) -> Arrays:
    """The arrays of another process's `share_arrays`, without a copy; writing to them stays in this process.

    Args:
        descriptor: The memory; it is closed, and freed when the arrays are.
        layout: What lies where.
    """
    try:
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    return _views(memory, layout)


def _views(memory: mmap.mmap, layout: Sequence[Sequence[Any]]) -> Arrays:
    views = {}
    for name, dtype, shape, first in layout:
        count = int(np.prod(shape, dtype=np.int64))
        views[name] = np.frombuffer(memory, dtype=np.dtype(dtype), count=count, offset=first).reshape(shape)
    return views
