"""A whole pack from the parts that the context-parallel ranks hold, for what needs to see all of a response."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.parallel.layout import PackLayout, copy_to


def gather_pack(values: Tensor, layout: PackLayout, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' parts of a pack, in order of position, on every rank; without gradient.

    One all-gather, in which every rank sends as many rows as the fullest rank has; nothing waits for the device.

    Args:
        values: [t, ...] of this rank's tokens.
        layout: Where the tokens lie; t = layout.num_local_tokens, T = layout.num_tokens.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.

    Returns:
        [T, ...].

    Raises:
        ValueError: `values` does not fit the layout, or `group` does not have `layout.cp_size` ranks.
    """
    check_group(layout, group)
    if values.shape[0] != layout.num_local_tokens:
        raise ValueError(f"values.shape[0] = {values.shape[0]}: this rank holds {layout.num_local_tokens} tokens")
    values = values.detach()
    if layout.cp_size == 1:
        return values
    sizes = [layout.on_rank(rank).num_local_tokens for rank in range(layout.cp_size)]
    sent = values.new_zeros(max(sizes), *values.shape[1:])
    sent[: len(values)] = values
    gathered = values.new_empty(layout.cp_size * max(sizes), *values.shape[1:])
    dist.all_gather_into_tensor(gathered, sent, group=group)
    parts = gathered.view(layout.cp_size, max(sizes), *values.shape[1:])
    joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return joined.index_select(0, copy_to(layout.joined_rows, values.device))


def check_group(layout: PackLayout, group: dist.ProcessGroup | None) -> None:
    """Refuse a group that does not have the layout's number of ranks."""
    size = 1 if group is None else dist.get_world_size(group)
    if layout.cp_size > 1 and size != layout.cp_size:
        raise ValueError(
            f"group = {'None' if group is None else f'{size} ranks'}: the layout has "
            f"cp_size = {layout.cp_size}; pass the context-parallel group"
        )
