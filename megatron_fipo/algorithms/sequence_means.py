"""Means over the response tokens of each sequence, across context-parallel ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.aggregation import SequenceCounts


def sequence_means(values: Tensor, mask: Tensor, sequences: SequenceCounts, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of a value over the response that each token belongs to; one all-reduce of 8·N bytes, without gradient.

    Args:
        values: [t].
        mask: [t] bool, response tokens that count.
        sequences: Per-sequence counts.
        group: The context-parallel group; None where one rank holds whole sequences.

    Returns:
        [t], the dtype of `values`; zero in sequences without response tokens.
    """
    lengths = sequences.response_lengths
    sums = torch.zeros(lengths.shape, dtype=torch.float64, device=values.device)
    sums.index_add_(0, sequences.sequence_ids, torch.where(mask, values.detach(), 0.0).double())
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    return (sums / lengths.clamp(min=1)).to(values.dtype)[sequences.sequence_ids]
