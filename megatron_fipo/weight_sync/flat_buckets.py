"""Tensors laid end to end in one buffer of bytes, as SGLang's "flattened_bucket" has it.

A receiver knows names, types and shapes in their order and finds each tensor by adding up sizes, so there is no room
for padding. Where wide types come first, every tensor still begins at a multiple of its item size: what precedes it is
made of items at least as wide, and item sizes are powers of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatTensor:
    """Place of one tensor in a buffer.

    Attributes:
        name: Its Hugging Face name.
        dtype: Its type.
        shape: Its shape.
        start, end: Bytes that it takes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype_name(self) -> str:
        """The type as servers spell it, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")


def plan_buffer(tensors: Mapping[str, Tensor]) -> list[FlatTensor]:
    """Places of tensors in a buffer, wide types first and otherwise in the given order."""
    places: list[FlatTensor] = []
    start = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        end = start + tensor.numel() * tensor.element_size()
        places.append(FlatTensor(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), start=start, end=end))
        start = end
    return places


def fill_buffer(buffer: Tensor, places: list[FlatTensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors to their places.

    Args:
        buffer: [n] uint8, n at least the end of the last place.
        places: From `plan_buffer`.
        tensors: By name; on any device, of any strides.
    """
    for place in places:
        view_tensor(buffer, place).copy_(tensors[place.name])


def view_tensor(buffer: Tensor, place: FlatTensor) -> Tensor:
    """The tensor at a place, as a view of the buffer."""
    return buffer[place.start : place.end].view(place.dtype).view(place.shape)
