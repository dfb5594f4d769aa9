"""Adds up metrics over ranks."""

import torch
import torch.distributed as dist

from megatron_fipo.metrics.quantiles import distributed_quantiles
from megatron_fipo.types import Accumulator, Distribution, Metrics

_OPERATIONS = {
    "mean": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def reduce_metrics(metrics: Metrics, group: dist.ProcessGroup | None = None) -> dict[str, Accumulator]:
    """Merge every rank's metrics: one all-reduce of float64 per kind present, and five of integers for all quantiles.

    Args:
        metrics: This rank's part; every rank of the group has the same keys and kinds.
        group: Ranks that hold different parts; all by default.

    Returns:
        All ranks' metrics, the wanted quantiles of a distribution each under its own name.
    """
    scalars = {key: value for key, value in metrics.items() if isinstance(value, Accumulator)}
    distributions = {key: value for key, value in sorted(metrics.items()) if isinstance(value, Distribution)}
    reduced: dict[str, Accumulator] = {}
    for kind, operation in _OPERATIONS.items():
        keys = sorted(key for key, value in scalars.items() if value.kind == kind)
        if not keys:
            continue
        totals = [scalars[key].total for key in keys]
        counts = [scalars[key].count for key in keys] if kind == "mean" else []
        packed = torch.stack(totals + counts)
        dist.all_reduce(packed, op=operation, group=group)
        for place, key in enumerate(keys):
            count = packed[len(keys) + place] if counts else scalars[key].count
            reduced[key] = Accumulator(kind, packed[place], count)  # type: ignore[arg-type]
    if distributions:
        found = distributed_quantiles(list(distributions.values()), group)
        for (key, distribution), (quantiles, count) in zip(distributions.items(), found, strict=True):
            reduced |= distribution.accumulators(key, quantiles, count)
    return reduced
