"""How work is cut into files and files are shared by ranks; the files do not depend on the ranks."""

from collections.abc import Sequence

import torch.distributed as dist


def cut_into_files(sizes: Sequence[int], max_bytes: int) -> list[range]:
    """Cut a row of things into files of at most so many bytes, in their order.

    Args:
        sizes: Bytes of each thing.
        max_bytes: What a file may reach; a larger thing has a file of its own.

    Returns:
        The things of each file.
    """
    files: list[range] = []
    start, filled = 0, 0
    for number, size in enumerate(sizes):
        if number > start and filled + size > max_bytes:
            files.append(range(start, number))
            start, filled = number, 0
        filled += size
    return [*files, range(start, len(sizes))]


def my_share(sizes: Sequence[int]) -> list[int]:
    """Which of several jobs this rank does: the largest first, each to the rank that has least.

    Args:
        sizes: Bytes of each job, the same on every rank.
    """
    rank, loads, mine = dist.get_rank(), [0] * dist.get_world_size(), []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = loads.index(min(loads))
        loads[least] += sizes[number]
        if least == rank:
            mine.append(number)
    return sorted(mine)
