"""Collectives on small host-side values. Nothing is pickled: values travel as JSON or as raw arrays."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.platform.device import compute_device

Arrays = dict[str, npt.NDArray[Any]]

# NumPy types that may travel, by the number that stands for them in a header.
_DTYPES = (np.int32, np.int64, np.float32, np.float64, np.bool_, np.uint8)


def broadcast_json(value: Any, src: int, group: dist.ProcessGroup | None = None) -> Any:
    """A JSON-able value from one rank to all.

    Args:
        value: The value; read on `src` alone.
        src: Global rank that has it.
        group: Ranks that take part; all by default.

    Returns:
        The value as JSON gives it back.
    """
    payload = torch.empty(0, dtype=torch.uint8)
    if dist.get_rank() == src:
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([payload.numel()], dtype=torch.int64)
    size = _broadcast(size, src, group)
    if dist.get_rank() != src:
        payload = torch.empty(int(size.item()), dtype=torch.uint8)
    payload = _broadcast(payload, src, group)
    return json.loads(payload.numpy().tobytes())


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's JSON-able value, in the order of the group, on every rank."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([payload.numel()], dtype=torch.int64)
    sizes = [int(each.item()) for each in _all_gather(size, group)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: payload.numel()] = payload
    parts = _all_gather(padded, group)
    return [json.loads(part[:count].numpy().tobytes()) for part, count in zip(parts, sizes, strict=True)]


def broadcast_arrays(
    arrays: Mapping[str, npt.NDArray[Any]] | None, src: int, group: dist.ProcessGroup | None = None
) -> Arrays:
    """Named arrays from one rank to all.

    Args:
        arrays: The arrays; read on `src` alone.
        src: Global rank that has them.
        group: Ranks that take part; all by default.
    """
    header = broadcast_json(_header(arrays) if dist.get_rank() == src else None, src, group)
    received: Arrays = {}
    for name, dtype, shape in header:
        if arrays is not None and dist.get_rank() == src:
            array = np.ascontiguousarray(arrays[name])
        else:
            array = np.empty(shape, dtype=_DTYPES[dtype])
        data = torch.from_numpy(array.reshape(-1).view(np.uint8))
        received[name] = _broadcast(data, src, group).numpy().view(_DTYPES[dtype]).reshape(shape)
    return received


def send_arrays(arrays: Mapping[str, npt.NDArray[Any]], dst: int) -> None:
    """Send named arrays to one rank, which calls `receive_arrays`."""
    header = torch.frombuffer(bytearray(json.dumps(_header(arrays)).encode()), dtype=torch.uint8)
    _send(torch.tensor([header.numel()], dtype=torch.int64), dst)
    _send(header, dst)
    for array in arrays.values():
        if array.size:
            _send(torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)), dst)


def receive_arrays(src: int) -> Arrays:
    """Receive what one rank sent with `send_arrays`."""
    size = _receive(torch.empty(1, dtype=torch.int64), src)
    header = _receive(torch.empty(int(size.item()), dtype=torch.uint8), src)
    received: Arrays = {}
    for name, dtype, shape in json.loads(header.numpy().tobytes()):
        array = np.empty(shape, dtype=_DTYPES[dtype])
        if array.size:
            data = _receive(torch.from_numpy(array.reshape(-1).view(np.uint8)), src)
            array = data.numpy().view(_DTYPES[dtype]).reshape(shape)
        received[name] = array
    return received


def _header(arrays: Mapping[str, npt.NDArray[Any]] | None) -> list[tuple[str, int, list[int]]]:
    assert arrays is not None, "the source rank must have the arrays"
    types = [np.dtype(each) for each in _DTYPES]
    return [(name, types.index(array.dtype), list(array.shape)) for name, array in arrays.items()]


def _wire(tensor: Tensor) -> Tensor:
    """The tensor where the default backend can reach it: NCCL-only groups need the device."""
    return tensor.to(compute_device()) if dist.get_backend() == "nccl" else tensor


def _broadcast(tensor: Tensor, src: int, group: dist.ProcessGroup | None) -> Tensor:
    wire = _wire(tensor)
    if wire.numel():
        dist.broadcast(wire, src=src, group=group)
    return wire.cpu()


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    wire = _wire(tensor)
    parts = [torch.empty_like(wire) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, wire, group=group)
    return [part.cpu() for part in parts]


def _send(tensor: Tensor, dst: int) -> None:
    dist.send(_wire(tensor), dst)


def _receive(tensor: Tensor, src: int) -> Tensor:
    wire = _wire(tensor)
    dist.recv(wire, src)
    return wire.cpu()
