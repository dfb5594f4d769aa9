"""Makes megatron-core's unconditional CUDA calls land on the CPU. Installed only where there is no CUDA device.

megatron-core trains on gloo and CPU tensors once its direct uses of `torch.cuda` are answered: it asks for the
current device, for streams and events, for the CUDA random state, for `device="cuda"` literals, and it checks
parameters by the type name `torch.cuda.FloatTensor`. Each patch below names the upstream place that needs it; the
version guard refuses releases that nobody has looked at, and `tests/unit/platform` tells when a place is gone.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_fipo.platform.device import uses_cuda
from megatron_fipo.runtime.logging import quiet_imports

REVIEWED_MEGATRON_CORE = "0.19."

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor")
_LIKE_FACTORIES = ("zeros_like", "ones_like", "empty_like", "full_like")
_installed = False


class _Stream:
    """Stands in for a CUDA stream: CPU work is already ordered."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, _stream: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_exc: Any) -> None:
        pass


class _Event:
    """Stands in for a CUDA event; keeps host time so that elapsed_time works."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._time = 0.0

    def record(self, _stream: Any = None) -> None:
        self._time = time.perf_counter()

    def wait(self, _stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return (other._time - self._time) * 1e3


def install() -> None:
    """Install every patch, once. Does nothing where CUDA is available.

    Raises:
        RuntimeError: The installed megatron-core is not a release that these patches were reviewed for.
    """
    global _installed
    if _installed or uses_cuda():
        return
    version = importlib.metadata.version("megatron-core")
    if not version.startswith(REVIEWED_MEGATRON_CORE):
        raise RuntimeError(
            f"megatron-core = {version}: the CPU patches were reviewed for {REVIEWED_MEGATRON_CORE}*; "
            "install the locked version or review megatron_fipo/platform/cpu_shims.py"
        )
    # jit_fuser is torch.compile: on CPU it costs half a minute of compilation and saves nothing.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # torch.compile keeps tables of torch.cuda's functions, so megatron-core, which uses it, is imported unpatched.
    with quiet_imports():
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        importlib.import_module("megatron.core.optimizer")
        importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    _patch_cuda_module()
    _patch_factories()
    _patch_tensor_methods()
    _patch_megatron()
    _installed = True


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _patch_cuda_module() -> None:
    """Answer `torch.cuda` calls (rotary embedding, pipeline schedules, DDP buffers, RNG tracker)."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = _nothing
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.current_stream = cuda.default_stream = lambda *_a, **_k: _Stream()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
        setattr(cuda, name, _nothing)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda *_a, **_k: 0)
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = lambda *_a, **_k: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_a, **_k: torch.set_rng_state(state)
    # torch.manual_seed calls back into torch.cuda, so the generator is seeded directly.
    cuda.manual_seed = lambda seed: _seed_default_generator(seed)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing


def _seed_default_generator(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _patch_factories() -> None:
    """Read `device="cuda"` as the CPU and drop pinned memory (optimizer constructors, rotary embedding under CP)."""
    # `with torch.device("meta")` looks factories up in this cached set: filled now, it knows the functions that the
    # wrappers call. Filled later it would hold the wrappers, and models would silently be built on the CPU.
    _device_constructors()
    for name in _FACTORIES + _LIKE_FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _cpu_for_cuda(device: Any) -> Any:
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    return _CPU if isinstance(device, str) and device.split(":")[0] == "cuda" else device


def _patch_tensor_methods() -> None:
    """Moves to CUDA stay on the CPU; the optimizer's check for `torch.cuda.*Tensor` passes."""
    tensor: Any = torch.Tensor
    original_to, original_type = tensor.to, tensor.type

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return original_to(self, *(_cpu_for_cuda(argument) for argument in args), **kwargs)

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        name = original_type(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    tensor.to = to
    tensor.type = type_
    tensor.cuda = lambda self, *_a, **_k: self
    tensor.pin_memory = lambda self, *_a, **_k: self
    tensor.record_stream = _nothing
    torch.nn.Module.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign, assignment]


def _patch_megatron() -> None:
    """Random state and expert split sizes, handled upstream for CUDA tensors only; Adam; rotary embedding; gloo."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random_module: Any = megatron_random
    random_module._get_cuda_rng_state = lambda *_a, **_k: torch.get_rng_state()
    random_module._set_cuda_rng_state = lambda state, *_a, **_k: torch.set_rng_state(state)

    def split_sizes_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = split_sizes_on_host

    from megatron_fipo.platform import cpu_adam, packed_rotary, uneven_splits

    cpu_adam.install()
    packed_rotary.install()
    uneven_splits.install()
