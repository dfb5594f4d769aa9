"""Adds up accumulators over ranks and renders them as numbers."""

import math

import torch
import torch.distributed as dist

from megatron_fipo.types import Accumulator, Metrics

_OPERATIONS = {
    "mean": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_EXTREME_OF_NOTHING = {"max": -math.inf, "min": math.inf}


def reduce_metrics(metrics: Metrics, group: dist.ProcessGroup) -> Metrics:
    """Merge every rank's metrics: one all-reduce per kind present, of float64 pairs.

    Args:
        metrics: This rank's part; every rank of the group has the same keys and kinds.
        group: Ranks that hold different parts.
    """
    reduced: Metrics = {}
    for kind, operation in _OPERATIONS.items():
        keys = sorted(key for key, value in metrics.items() if value.kind == kind)
        if not keys:
            continue
        totals = [metrics[key].total for key in keys]
        counts = [metrics[key].count for key in keys] if kind == "mean" else []
        packed = torch.stack(totals + counts)
        dist.all_reduce(packed, op=operation, group=group)
        for place, key in enumerate(keys):
            count = packed[len(keys) + place] if counts else metrics[key].count
            reduced[key] = Accumulator(kind, packed[place], count)  # type: ignore[arg-type]
    return reduced


def render_metrics(metrics: Metrics) -> dict[str, float]:
    """Numbers of all metrics that have one; a mean over nothing and an extreme of nothing are left out."""
    keys = sorted(metrics)
    if not keys:
        return {}
    values = torch.stack([torch.stack([metrics[key].total, metrics[key].count]) for key in keys]).tolist()
    rendered = {}
    for key, (total, count) in zip(keys, values, strict=True):
        kind = metrics[key].kind
        if kind == "mean":
            if count:
                rendered[key] = total / count
        elif total != _EXTREME_OF_NOTHING.get(kind):
            rendered[key] = total
    return rendered
