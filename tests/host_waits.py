"""Refuses what would make the host wait for a device, as far as the CPU can show it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its size, the host has to know.
WAITING = frozenset(
    "_local_scalar_dense is_nonzero nonzero masked_select unique_dim _unique2 unique_consecutive equal bincount".split()
)


class NoHostWaits(TorchDispatchMode):
    """Raises on an operator of `WAITING`, an index by booleans, and `repeat_interleave` of unknown size."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise AssertionError(f"{func}: the host would wait for the device")
        if name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        ):
            raise AssertionError(f"{func} with booleans: the host would wait for the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise AssertionError(f"{func} without output_size: the host would wait for the device")
        return func(*args, **(kwargs or {}))
