"""In the place of SGLang's package of CUDA kernels, which its code for CPUs imports functions from.

The servers here call none of them: they serve speculative decoding and the moving of cache pages. As no operator
`torch.ops.sgl_kernel` is registered either, SGLang takes its layers of plain PyTorch.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} runs on CUDA alone")

    return missing
