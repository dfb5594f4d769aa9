"""Group-relative advantages (eq. 1, arXiv:2603.19835)."""

import torch
from torch import Tensor

from megatron_fipo.algorithms.filters import samples_with_signal


def group_relative_advantages(
    rewards: Tensor, group_ids: Tensor, *, normalize_by_std: bool = True, epsilon: float = 1e-6
) -> Tensor:
    """Advantage of every sample within its group, (R − mean) / (std + ε).

    The standard deviation is the unbiased one (n − 1). A group whose rewards are all equal gets exactly zero,
    and so does a group of one sample: with nothing to compare it with, it says nothing about the policy.

    Args:
        rewards: [N] floating.
        group_ids: [N] integers, in any order.
        normalize_by_std: Divide by the standard deviation; False leaves R − mean.
        epsilon: ε, in reward units.

    Returns:
        [N] float32.

    Raises:
        ValueError: A reward is not finite.
    """
    values = rewards.double()
    if not bool(values.isfinite().all()):
        index = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"rewards[{index}] = {float(values[index])}: must be finite; score the sample first")
    _, groups, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    means = values.new_zeros(counts.shape).index_add_(0, groups, values) / counts
    centred = values - means[groups]
    if normalize_by_std:
        squares = values.new_zeros(counts.shape).index_add_(0, groups, centred.square())
        centred = centred / ((squares / (counts - 1).clamp(min=1)).sqrt() + epsilon)[groups]
    return torch.where(samples_with_signal(values, group_ids), centred, 0.0).float()
