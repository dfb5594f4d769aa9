"""Dynamic sampling: which groups of samples carry a training signal."""

import torch
from torch import Tensor


def samples_with_signal(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Whether the rewards of a sample's group differ, so that its group-relative advantages are not all zero.

    The test is exact (largest against smallest reward), so it does not depend on rounding in a variance.

    Args:
        rewards: [N] floating.
        group_ids: [N] integers, in any order.

    Returns:
        [N] bool.
    """
    _, groups = torch.unique(group_ids, return_inverse=True)
    shape = (int(groups.max()) + 1 if groups.numel() else 0,)
    largest = rewards.new_full(shape, float("-inf")).scatter_reduce(0, groups, rewards, "amax")
    smallest = rewards.new_full(shape, float("inf")).scatter_reduce(0, groups, rewards, "amin")
    return (largest > smallest)[groups]
