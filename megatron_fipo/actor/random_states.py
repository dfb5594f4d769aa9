"""Every random state of a rank as bytes of one length, so that a checkpoint holds them as rows of a tensor."""

import base64
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_fipo.platform.device import uses_cuda

# A state is about 35 KiB; the rest is for its numbers to have more digits.
NUM_BYTES = 2**17


@dataclass(frozen=True, slots=True)
class RandomStates:
    """States of Python, NumPy, PyTorch, CUDA (None without it) and megatron-core's tracker at one moment."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None
    tracker: dict[str, Tensor]

    @classmethod
    def now(cls) -> "RandomStates":
        """The present ones; in less than 0.1 ms."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=True),
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state() if uses_cuda() else None,
            tracker=dict(get_cuda_rng_tracker().get_states()),
        )

    def restore(self) -> None:
        """Set all of them."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if uses_cuda() and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        get_cuda_rng_tracker().set_states(dict(self.tracker))


@contextmanager
def random_states_of(states: RandomStates) -> Iterator[None]:
    """Have the random states of another moment inside the block, and afterwards those from before it."""
    before = RandomStates.now()
    states.restore()
    try:
        yield
    finally:
        before.restore()


def pack_random_states() -> Tensor:
    """The present random states: [NUM_BYTES] uint8."""
    states = RandomStates.now()
    name, keys, *rest = states.numpy
    told = {
        "python": states.python,
        "numpy": [name, [int(key) for key in keys], *rest],
        "torch": _text(states.torch),
        "cuda": None if states.cuda is None else _text(states.cuda),
        "tracker": {name: _text(state) for name, state in states.tracker.items()},
    }
    packed = json.dumps(told).encode().ljust(NUM_BYTES)
    assert len(packed) == NUM_BYTES, "the random states need more bytes"
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_random_states(packed: Tensor) -> None:
    """Set all of them.

    Args:
        packed: From `pack_random_states`, on a rank that stands where this one does.
    """
    told: dict[str, Any] = json.loads(packed.numpy().tobytes())
    version, numbers, gauss = told["python"]
    name, keys, *rest = told["numpy"]
    RandomStates(
        python=(version, tuple(numbers), gauss),
        numpy=(name, np.array(keys, dtype=np.uint32), *rest),
        torch=_state(told["torch"]),
        cuda=None if told["cuda"] is None else _state(told["cuda"]),
        tracker={name: _state(text) for name, text in told["tracker"].items()},
    ).restore()


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _state(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
