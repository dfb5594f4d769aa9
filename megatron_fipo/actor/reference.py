"""The reference policy: the weights that the model has now, kept beside it for a reference-KL term."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.actor.model import unwrap
from megatron_fipo.platform.device import uses_cuda
from megatron_fipo.platform.host_memory import require_resident


class ReferencePolicy:
    """A copy of this rank's weights on the host, which trades places with them for a forward pass.

    It holds what the rank holds, in the same dtypes: a shard under tensor, pipeline and expert parallelism, whole where
    ranks hold the same, and buffers that belong to the model, too. The model's tensors stay where they are and change
    their contents alone, so whatever refers to them (data-parallel buffers, the optimizer's shards) stays right, and
    they are the same bits afterwards. No rank talks to another.

    Args:
        chunks: The model chunks of this rank, with the weights that are to be the reference.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._pairs = [(tensor, _host_copy(tensor)) for tensor in _tensors(chunks)]

    @property
    def num_bytes(self) -> int:
        """Host memory of the copy."""
        return sum(copy.nbytes for _, copy in self._pairs)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference policy inside; its own weights are back afterwards, also after an exception.

        Forward passes alone may run inside: what a backward pass or an optimizer did there would be done to the
        reference. On CUDA the copies are queued on the current stream, and the host waits for none of them.

        Raises:
            RunError: The model's weights are off the device.
        """
        require_resident((tensor for tensor, _ in self._pairs), "the actor's weights")
        exchanged: list[tuple[Tensor, Tensor]] = []
        try:
            for pair in self._pairs:
                _exchange(*pair)
                exchanged.append(pair)
            yield
        finally:
            for pair in exchanged:
                _exchange(*pair)


def _tensors(chunks: Sequence[Any]) -> list[Tensor]:
    """Parameters and buffers of all chunks, each once."""
    # Of the bare models: the data-parallel wrapper calls something else its buffers.
    bare = unwrap(list(chunks))
    found = {id(tensor): tensor for chunk in bare for tensor in (*chunk.parameters(), *chunk.buffers())}
    return list(found.values())


def _host_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=uses_cuda())
    return copy.copy_(tensor.detach())


@torch.no_grad()
def _exchange(tensor: Tensor, copy: Tensor) -> None:
    held = tensor.detach().clone()
    tensor.copy_(copy, non_blocking=True)
    copy.copy_(held, non_blocking=True)
