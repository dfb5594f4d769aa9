"""Which device the ranks compute on: CUDA where there is one, else the CPU."""

import importlib.util
import os
import resource

import psutil
import torch

# Precisions by the names that configurations use.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def uses_cuda() -> bool:
    """Whether ranks compute on CUDA devices."""
    return torch.cuda.is_available()


def uses_transformer_engine() -> bool:
    """Whether the transformer is built from Transformer Engine's modules: on CUDA, where it is installed."""
    return uses_cuda() and importlib.util.find_spec("transformer_engine") is not None


def compute_device() -> torch.device:
    """This rank's device; on CUDA the one that LOCAL_RANK names."""
    if uses_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def collective_backend() -> str:
    """Backend of the process groups: NCCL for CUDA tensors, with gloo for CPU tensors beside it; gloo alone on CPU."""
    return "cpu:gloo,cuda:nccl" if uses_cuda() else "gloo"


def peak_memory_bytes() -> int:
    """Highest memory use so far: CUDA allocations of this rank, or its resident set on the CPU."""
    if uses_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_memory_bytes() -> int:
    """Resident set of this process now."""
    resident: int = psutil.Process().memory_info().rss
    return resident
