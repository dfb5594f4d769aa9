"""Exact quantiles of values that lie on several ranks, without moving a value.

Values are compared as integers (`Distribution.sorted_keys`). The wanted order statistic is found eight bits at a time:
every rank counts its values below each of 256 candidates, the counts are added up, and the last candidate with few
enough values below it is the prefix of the next pass. Counts are integers, so the result is bit for bit the same
however the values are cut.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.types import FIRST_NAN_KEY, Distribution, nearest_rank, numbers_of

_BITS = 8
_LOWEST = -(2**31)


def distributed_quantiles(
    distributions: list[Distribution], group: dist.ProcessGroup | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Quantiles of all ranks' values: four all-reduces in `group`, of 2 KiB each for every wanted quantile.

    Args:
        distributions: This rank's parts, maybe without a value; every rank has as many, with the same levels.
        group: Ranks that hold different parts; all by default.

    Returns:
        For each distribution the quantiles [levels] float32, which mean nothing where there is no value, and the number
        of values (0-dim int64).
    """
    keys = [each.sorted_keys() for each in distributions]
    device = keys[0].device
    steps = torch.arange(2**_BITS, device=device)
    # The first pass is the same for all quantiles of a distribution. Its last bound counts every number.
    first = _LOWEST + (steps << (32 - _BITS))
    bounds = torch.cat([first, first.new_tensor([FIRST_NAN_KEY])])
    below = _count_below(keys, [bounds] * len(keys), group).reshape(len(keys), -1)
    counts = below[:, -1]
    owners, levels = torch.tensor(
        [(number, level) for number, each in enumerate(distributions) for level in each.levels], device=device
    ).unbind(dim=1)
    ranks = nearest_rank(levels, counts[owners])
    sizes = [len(each.levels) for each in distributions]
    found = first[_last_with_enough_room(below[owners, :-1], ranks)]
    for shift in range(32 - 2 * _BITS, -1, -_BITS):
        candidates = found[:, None] + (steps << shift)
        below = _count_below(keys, list(candidates.split(sizes)), group).reshape(candidates.shape)
        found = candidates.gather(1, _last_with_enough_room(below, ranks)[:, None]).squeeze(1)
    return list(zip(numbers_of(found).split(sizes), counts, strict=True))


def _count_below(keys: list[Tensor], bounds: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """Number of keys of all ranks below every bound of their distribution, end to end."""
    counts = [torch.searchsorted(mine, each.int().reshape(-1)) for mine, each in zip(keys, bounds, strict=True)]
    below = torch.cat(counts)
    dist.all_reduce(below, group=group)
    return below


def _last_with_enough_room(below: Tensor, ranks: Tensor) -> Tensor:
    """Place [levels] of the last candidate that has no more than `ranks` keys below it."""
    return (below <= ranks[:, None]).sum(dim=1) - 1
