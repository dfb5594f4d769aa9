"""The Future-KL as a plain Triton loop over time, one program a row: a baseline for benchmark_future_kl.py on CUDA."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor


def serial_scan(rows: Tensor, half_life: float) -> Tensor:
    """F_t = Δ_t + γ·F_{t+1}: [B, L] to [B, L] in the same dtype, summed in float32."""
    rows = rows.contiguous()
    sums = torch.empty_like(rows)
    _serial_kernel[(rows.shape[0],)](rows, sums, rows.shape[1], 2.0 ** (-1.0 / half_life), num_warps=1)
    return sums


@triton.jit
def _serial_kernel(rows, sums, length, gamma):
    first = tl.program_id(0) * length
    total = 0.0
    for step in range(length):
        place = first + length - 1 - step
        total = tl.load(rows + place).to(tl.float32) + gamma * total
        tl.store(sums + place, total)
