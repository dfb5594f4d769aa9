"""What SGLang's servers need on a machine without CUDA; Python imports it when one of their processes starts.

Servers alone have this folder on PYTHONPATH, as the first (`rollout/servers/command.py` puts it there). It imports
nothing heavy by itself: what it changes, it changes once SGLang has imported it. Beside it are `sgl_kernel`, in the
place of a package that exists for CUDA alone, and `sglang_cpu_models`.
`tests/unit/platform/test_sglang_cpu_shim.py` tells when SGLang no longer needs a patch.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

REVIEWED_SGLANG = "0.5.21"

# Of no use to a server, and found by transformers and accelerate, which import what they find: scipy for the losses of
# object detection, and so on. That costs each of a server's processes seconds.
HIDDEN = ("megatron", "megatron_fsdp", "scipy", "tensorboard", "wandb")


def _check_version(sglang: ModuleType) -> None:
    """Refuse a release of SGLang that nobody has looked at."""
    version = importlib.metadata.version("sglang")
    if version != REVIEWED_SGLANG:
        raise RuntimeError(
            f"sglang = {version}: servers on a machine without CUDA need patches, which were reviewed for "
            f"{REVIEWED_SGLANG}; install that, or review {__file__}"
        )


def _compile_nothing(torch: Any) -> None:
    """Let `torch.compile` return what it is given: its decorators alone import Inductor, for seconds."""

    def compile_nothing(model: Any = None, **settings: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = compile_nothing


def _pin_nothing(module: Any) -> None:
    """Leave out what page-locks host memory for CUDA; routed experts are collected in such memory."""
    module._cuda_host_register = _do_nothing


def _wait_for_nothing(module: Any) -> None:
    """Leave out waiting for CUDA, which checksums of weights do whatever the device."""
    module.torch.cuda.synchronize = _do_nothing


def _have_no_nccl(module: Any) -> None:
    """Hide the NCCL that a PyTorch for CUDA brings along: ranks of a server would open a CUDA device for it."""

    def find_none(*_args: Any) -> None:
        raise OSError("NCCL is for CUDA")

    module.NCCLLibrary = find_none


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "sglang.version": _check_version,
    "torch": _compile_nothing,
    "sglang.srt.distributed.device_communicators.pynccl": _have_no_nccl,
    "sglang.srt.mem_cache.pool_host.common": _pin_nothing,
    "sglang.srt.utils.weight_checker": _wait_for_nothing,
}


class _PatchingFinder:
    """Finds the modules of `AFTER_IMPORT` as usual, and has them patched once they are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in AFTER_IMPORT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            AFTER_IMPORT[name](module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def _run_the_environments_own() -> None:
    """Run the `sitecustomize` that this one hides, where there is one."""
    here = Path(__file__).parent
    others = [place for place in sys.path if Path(place).resolve() != here.resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# An entry of None is how Python itself notes that there is no such module.
sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]
sys.meta_path.insert(0, _PatchingFinder())
_run_the_environments_own()
