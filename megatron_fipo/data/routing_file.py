"""The experts that an engine chose for the tokens of a rollout, in a file of which every rank reads its own part.

They are by far the largest thing that a rollout brings: for 84 M tokens, 48 layers and 8 experts a token 32 GB, in one
byte each. So they go from the rollout controller to the ranks through a folder that all nodes see, not through rank 0.

A file holds two arrays in NumPy's format, one behind the other, for the T tokens of a batch in its order:

- recorded [T] bool: whether the token's experts are known. Those of a sequence's last token never are.
- experts [L, T, k], one byte each where no expert is above 255, else int16. With layers in front, a pipeline stage
  reads nothing of other stages' layers, and a sequence is one piece of every layer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.whole_file import whole_file
from megatron_fipo.types import IntArray, LongArray

_ONE_BYTE = 256


class RoutingFileError(RunError):
    """Experts of a rollout that cannot be used."""


def write_routing_file(
    path: Path, sequence_lengths: IntArray, routed_experts: Sequence[npt.NDArray[Any] | None]
) -> None:
    """Write the experts of a batch's sequences; the file appears complete or not at all.

    Args:
        path: The file; its folder must exist.
        sequence_lengths: [N] tokens of every sequence, prompt and response.
        routed_experts: N times [length − 1, L, k] integers, experts of each position but the last; a position with a
            negative entry is not recorded, nor is any of a sequence with None.

    Raises:
        RoutingFileError: No sequence has experts, or an array has another shape than its sequence asks for.
    """
    shapes = {each.shape[1:] for each in routed_experts if each is not None}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise RoutingFileError(
            f"routed experts of shapes {sorted(shapes)} came back: all must be [tokens, layers, experts a token] of "
            "one model; does the engine return them, and do all servers serve this model?"
        )
    ((num_layers, top_k),) = shapes
    starts = np.concatenate([[0], np.cumsum(sequence_lengths, dtype=np.int64)])
    recorded = np.zeros(int(starts[-1]), dtype=bool)
    for number, (experts, start, length) in enumerate(zip(routed_experts, starts, sequence_lengths, strict=False)):
        if experts is None:
            continue
        if len(experts) != length - 1:
            raise RoutingFileError(f"sequence {number} of {length} tokens has routed experts of {len(experts)}")
        recorded[start : start + len(experts)] = (experts >= 0).all(axis=(1, 2))
    largest = max(int(each.max(initial=0)) for each in routed_experts if each is not None)
    dtype = np.dtype(np.uint8 if largest < _ONE_BYTE else np.int16)
    shape = (num_layers, int(starts[-1]), top_k)
    with whole_file(path) as file:
        np.lib.format.write_array(file, recorded)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        _write_pieces(file, shape, dtype, starts, routed_experts)


def _write_pieces(
    file: BinaryIO,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    starts: LongArray,
    routed_experts: Sequence[npt.NDArray[Any] | None],
) -> None:
    """Put every sequence's piece of every layer in its place; what is left out reads as 0."""
    num_layers, num_tokens, top_k = shape
    first, row = file.tell(), top_k * dtype.itemsize
    file.truncate(first + num_layers * num_tokens * row)
    for start, experts in zip(starts, routed_experts, strict=False):
        if experts is None:
            continue
        layers = np.ascontiguousarray(experts.transpose(1, 0, 2).astype(dtype))
        for number, layer in enumerate(layers):
            file.seek(first + (number * num_tokens + int(start)) * row)
            file.write(layer.data)


class RoutingFile:
    """A file of `write_routing_file`, mapped into memory: what is not asked for is not read.

    Args:
        path: The file.

    Attributes:
        num_layers, num_tokens, top_k: L, T and k.

    Raises:
        RoutingFileError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                recorded, recorded_at = _read_header(file)
                file.seek(recorded_at + int(np.prod(recorded[0])) * recorded[1].itemsize)
                experts, experts_at = _read_header(file)
            self._recorded = np.memmap(path, recorded[1], "r", recorded_at, recorded[0])
            self._experts = np.memmap(path, experts[1], "r", experts_at, experts[0])
            self.num_layers, self.num_tokens, self.top_k = self._experts.shape
        except (OSError, ValueError, EOFError) as error:
            raise RoutingFileError(f"{path}: cannot be read as routed experts ({error})") from error

    def read(self, layers: Sequence[int], tokens: LongArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Experts of some tokens in some layers.

        Args:
            layers: Numbers in [0, L).
            tokens: [t] numbers in [0, T); −1 stands for padding.

        Returns:
            [len(layers), t, k] uint8 or int16, 0 where not recorded; and [t] bool, whether recorded.
        """
        recorded = tokens >= 0
        recorded[recorded] = self._recorded[tokens[recorded]]
        experts = np.zeros((len(layers), len(tokens), self.top_k), dtype=self._experts.dtype)
        for place, layer in enumerate(layers):
            experts[place, recorded] = self._experts[layer][tokens[recorded]]
        return experts, recorded


def _read_header(file: BinaryIO) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], int]:
    """Shape and type of the array that begins here, and where its values begin."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"array format {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype.hasobject:
        raise ValueError("array of another kind")
    return (shape, dtype), file.tell()
