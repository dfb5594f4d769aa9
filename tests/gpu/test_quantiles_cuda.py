"""Quantiles of values on a CUDA device: the same bits as on the CPU, and nothing waits while values are collected."""

import pytest
import torch

from megatron_fipo.metrics.quantiles import distributed_quantiles
from megatron_fipo.types import Distribution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LEVELS = (1, 10, 250, 500, 750, 995, 999)


def test_quantiles_are_those_of_the_cpu(world: None) -> None:
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).exp()
    mask = values < 3
    on_cpu, on_cuda = (
        distributed_quantiles([Distribution.of(values.to(device), mask.to(device), LEVELS)])[0]
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cuda[0].cpu(), on_cpu[0])
    assert int(on_cuda[1]) == int(on_cpu[1]) == int(mask.sum())


def test_collecting_values_does_not_wait_for_the_device() -> None:
    values = torch.randn(1000, device="cuda")
    mask = values > 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = [Distribution.of(values, mask, LEVELS) for _ in range(2)]
        parts[0].merge(parts[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
