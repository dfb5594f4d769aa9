"""Exact quantiles of values that lie on several ranks, without moving a value.

The bits of a float32, with the magnitude bits of negative numbers flipped, are integers in the order of the numbers.
The wanted order statistic is found eight bits at a time: every rank counts its values below each of 256 candidates,
the counts are added up, and the last candidate with few enough values below it is the prefix of the next pass. Counts
are integers, so the result is bit for bit the same however the values are cut.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.types import Distribution, nearest_rank

_BITS = 8
_LOWEST = -(2**31)
_LARGEST_NUMBER = 0x7F800000  # +inf; what lies above is NaN
_SIGN_KEPT = 0x7FFFFFFF


def distributed_quantiles(
    distributions: list[Distribution], group: dist.ProcessGroup | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Quantiles of all ranks' values: five all-reduces in `group`, of 2 KiB a wanted quantile and one count each.

    Args:
        distributions: This rank's parts, maybe without a value; every rank has as many, with the same levels.
        group: Ranks that hold different parts; all by default.

    Returns:
        For each distribution the quantiles [levels] float32, which mean nothing where there is no value, and the number
        of values (0-dim int64).
    """
    keys = [_sorted_keys(each) for each in distributions]
    largest = torch.full((1,), _LARGEST_NUMBER, dtype=torch.int32, device=keys[0].device)
    counts = torch.cat([torch.searchsorted(each, largest, right=True) for each in keys])
    dist.all_reduce(counts, group=group)
    sizes = [len(each.levels) for each in distributions]
    wanted = [(number, level) for number, each in enumerate(distributions) for level in each.levels]
    owners, levels = torch.tensor(wanted, device=counts.device).unbind(dim=1)
    ranks = nearest_rank(levels, counts[owners])
    found = torch.full_like(ranks, _LOWEST)
    for shift in range(32 - _BITS, -1, -_BITS):
        candidates = found[:, None] + (torch.arange(2**_BITS, device=counts.device) << shift)
        below = torch.cat(
            [torch.searchsorted(mine, bounds.int()) for mine, bounds in zip(keys, candidates.split(sizes), strict=True)]
        )
        dist.all_reduce(below, group=group)
        found = candidates.gather(1, (below <= ranks[:, None]).sum(dim=1, keepdim=True) - 1).squeeze(1)
    return list(zip(_numbers(found).split(sizes), counts, strict=True))


def _sorted_keys(distribution: Distribution) -> Tensor:
    """[n] int32, ascending in the order of the numbers; NaN comes last."""
    bits = torch.cat(distribution.parts).view(torch.int32)
    return torch.where(bits < 0, bits ^ _SIGN_KEPT, bits).sort().values


def _numbers(keys: Tensor) -> Tensor:
    """The numbers that keys stand for."""
    bits = keys.int()
    return torch.where(bits < 0, bits ^ _SIGN_KEPT, bits).view(torch.float32)
