"""Log-probabilities on a CUDA device against float64 on the same device, without a wait, in the memory they promise.

python -m pytest -m gpu tests/gpu/test_log_probs_cuda.py
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_fipo.actor.log_probs import VocabularyShard, linear_log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("world"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16]
# Largest error of a log-probability or entropy, and ‖a − b‖ / ‖b‖ of a gradient, against float64 on the same inputs. In
# bfloat16 the logits themselves are rounded, by up to 2⁻⁹ of their size; a float32 product may go through TF32.
TOLERANCES = {torch.float32: (1e-3, 2e-3), torch.bfloat16: (8e-2, 1e-2)}


def draw(num_tokens: int, rows: int, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and output matrix, whose logits have a standard deviation of 2, and no target in padding rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, device="cuda", generator=generator)
    weight = torch.randn(rows, hidden_size, device="cuda", generator=generator) * 2 * hidden_size**-0.5
    targets = torch.randint(0, rows - 24, (num_tokens,), device="cuda", generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def scores(
    inputs: tuple[Tensor, Tensor, Tensor], vocab_size: int, chunk_tokens: int, recompute: bool
) -> tuple[Tensor, Tensor]:
    group = torch.distributed.group.WORLD
    assert group is not None
    shard = VocabularyShard(start=0, vocab_size=vocab_size, group=group)
    return linear_log_probs(*inputs, shard, temperature=0.7, chunk_tokens=chunk_tokens, recompute_logits=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_match_float64(dtype: torch.dtype, recompute: bool) -> None:
    inputs = hidden, weight, targets = draw(300, 1024, 64, dtype)
    log_probs, entropy = scores(inputs, 1000, 77, recompute)
    logits = (hidden.double() @ weight.double()[:1000].t()) / 0.7
    log_softmax = logits.log_softmax(dim=-1)
    exact = log_softmax.gather(1, targets[:, None]).squeeze(1)
    exact_entropy = -(log_softmax.exp() * log_softmax).sum(dim=-1)
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert log_probs.dtype == entropy.dtype == torch.float64
    assert (log_probs - exact).abs().max() < value_tolerance / 0.7
    assert (entropy - exact_entropy).abs().max() < value_tolerance / 0.7
    factors = torch.randn(300, device="cuda", dtype=torch.float64)
    mine = torch.autograd.grad(log_probs, (hidden, weight), factors)
    wanted = torch.autograd.grad((exact * factors).sum(), (hidden, weight))
    for gradient, reference in zip(mine, wanted, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - reference.double()).norm() < gradient_tolerance * reference.double().norm()
    assert not mine[1][1000:].any(), "padding rows have a gradient"


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_waits_for_the_device(recompute: bool) -> None:
    inputs = draw(300, 1024, 64, torch.bfloat16)
    factors = torch.randn(300, device="cuda", dtype=torch.float64)

    def once() -> None:
        log_probs, _ = scores(inputs, 1000, 77, recompute)
        torch.autograd.grad(log_probs, inputs[:2], factors)

    once()  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_bytes(action: Callable[[], object]) -> int:
    """Most that was allocated at a time above what was before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_working_memory(dtype: torch.dtype, recompute: bool) -> None:
    num_tokens, rows, chunk_tokens = 4096, 32_768, 512
    inputs = draw(num_tokens, rows, 256, dtype)
    factors = torch.randn(num_tokens, device="cuda", dtype=torch.float64)

    def once() -> None:
        log_probs, _ = scores(inputs, rows, chunk_tokens, recompute)
        torch.autograd.grad(log_probs, inputs[:2], factors)

    once()  # cuBLAS takes its workspace once
    copy = num_tokens * rows * dtype.itemsize
    gradients = sum(tensor.numel() * tensor.itemsize for tensor in inputs[:2])
    allowed = (chunk_tokens / num_tokens if recompute else 1.0) + 0.1
    assert peak_bytes(once) <= allowed * copy + gradients
