"""Gathers and reduce-scatters whose parts differ in length, for gloo.

Experts that share their matrices (expert tensor parallelism) gather tokens that ranks hold different numbers of.
NCCL's `all_gather` and `reduce_scatter` take such lists; gloo's want parts of one length.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """Give megatron-core's two functions an answer for parts of different lengths."""
    from megatron.core.tensor_parallel import mappings

    mappings._gather_along_first_dim = _gathering(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _scattering(mappings._reduce_scatter_along_first_dim)


def _gathering(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def gather(input_: Tensor, group: Any, output_split_sizes: list[int] | None = None, *args: Any) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, output_split_sizes, *args)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = input_.new_empty(group.size(), *padded.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather


def _scattering(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce_scatter(input_: Tensor, group: Any, input_split_sizes: list[int] | None = None, *args: Any) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, input_split_sizes, *args)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    return reduce_scatter
