"""Adds up metrics over ranks."""

import torch
import torch.distributed as dist

from megatron_fipo.metrics.quantiles import distributed_quantiles
from megatron_fipo.types import Accumulator, Distribution, Metrics

_ADDED = ("mean", "sum")


def reduce_metrics(metrics: Metrics, group: dist.ProcessGroup | None = None) -> dict[str, Accumulator]:
    """Merge every rank's metrics: an all-reduce of sums and one of extremes (float64), and four for all quantiles.

    Args:
        metrics: This rank's part; every rank of the group has the same keys and kinds.
        group: Ranks that hold different parts; all by default.

    Returns:
        All ranks' metrics, the wanted quantiles of a distribution each under its own name.
    """
    scalars = {key: value for key, value in sorted(metrics.items()) if isinstance(value, Accumulator)}
    distributions = {key: value for key, value in sorted(metrics.items()) if isinstance(value, Distribution)}
    added = {key: value for key, value in scalars.items() if value.kind in _ADDED}
    extremes = {key: value for key, value in scalars.items() if value.kind not in _ADDED}
    reduced: dict[str, Accumulator] = {}
    if added:
        pairs = torch.stack([torch.stack([value.total, value.count]) for value in added.values()])
        dist.all_reduce(pairs, group=group)
        for (key, value), (total, count) in zip(added.items(), pairs, strict=True):
            reduced[key] = Accumulator(value.kind, total, count if value.kind == "mean" else value.count)
    if extremes:
        # The smallest is the negative of the largest negative.
        largest = torch.stack([-value.total if value.kind == "min" else value.total for value in extremes.values()])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        for (key, value), total in zip(extremes.items(), largest, strict=True):
            reduced[key] = Accumulator(value.kind, -total if value.kind == "min" else total, value.count)
    if distributions:
        found = distributed_quantiles(list(distributions.values()), group)
        for (key, distribution), (quantiles, count) in zip(distributions.items(), found, strict=True):
            reduced |= distribution.accumulators(key, quantiles, count)
    return reduced
