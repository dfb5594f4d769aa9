"""Every random state of a rank as bytes of one length, so that a checkpoint holds them as rows of a tensor."""

import base64
import json
import random
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_fipo.platform.device import uses_cuda

# A state is about 35 KiB; the rest is for its numbers to have more digits.
NUM_BYTES = 2**17


def pack_random_states() -> Tensor:
    """The states of Python, NumPy, PyTorch, CUDA and megatron-core's tracker: [NUM_BYTES] uint8."""
    name, keys, *rest = np.random.get_state(legacy=True)
    told = {
        "python": random.getstate(),
        "numpy": [name, [int(key) for key in keys], *rest],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if uses_cuda() else None,
        "tracker": {name: _text(state) for name, state in get_cuda_rng_tracker().get_states().items()},
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
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = told["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_state(told["torch"]))
    if uses_cuda() and told["cuda"] is not None:
        torch.cuda.set_rng_state(_state(told["cuda"]))
    get_cuda_rng_tracker().set_states({name: _state(text) for name, text in told["tracker"].items()})


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _state(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
