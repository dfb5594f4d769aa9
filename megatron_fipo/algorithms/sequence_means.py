"""Means over the response tokens of each sequence, across context-parallel ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.aggregation import SequenceCounts
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.parallel.packs import check_group


def sequence_means(
    values: Tensor, mask: Tensor, sequences: SequenceCounts, layout: PackLayout, group: dist.ProcessGroup | None
) -> Tensor:
    """Mean of a value over the response that each token belongs to; one all-reduce of 8·N bytes, without gradient.

    Args:
        values: [t].
        mask: [t] bool, response tokens that count.
        sequences: Per-sequence counts.
        layout: Where the tokens lie.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.

    Returns:
        [t], the dtype of `values`; zero in sequences without response tokens.

    Raises:
        ValueError: `group` does not have `layout.cp_size` ranks.
    """
    check_group(layout, group)
    lengths = sequences.response_lengths
    sums = torch.zeros(lengths.shape, dtype=torch.float64, device=values.device)
    sums.index_add_(0, sequences.sequence_ids, torch.where(mask, values.detach(), 0.0).double())
    if layout.cp_size > 1:
        dist.all_reduce(sums, group=group)
    return (sums / lengths.clamp(min=1)).to(values.dtype)[sequences.sequence_ids]
