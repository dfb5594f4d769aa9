"""The definition of the Future-KL, written for reading and for tests: quadratic time, float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def future_kl(
    log_ratio: Tensor, decay_half_life_tokens: float, cu_seqlens: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Future-KL by its definition, F_t = Σ_{k≥t} γ^(k−t) Δ_k inside every sequence (eq. 6, arXiv:2603.19835).

    Args:
        log_ratio: [T] sequences end to end, or [B, T] one sequence a row; zero on tokens that take no part.
        decay_half_life_tokens: τ, with γ = 2^(−1/τ); may be infinite.
        cu_seqlens: Starts of the sequences of a [T] input, and its end; None for a single one.

    Returns:
        The shape of `log_ratio`, float64.
    """
    values = log_ratio.detach().double()
    if values.dim() == 2:
        return torch.stack([_sequence(row, decay_half_life_tokens) for row in values])
    bounds = [0, values.shape[0]] if cu_seqlens is None else [int(bound) for bound in cu_seqlens]
    result = torch.zeros_like(values)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        result[start:end] = _sequence(values[start:end], decay_half_life_tokens)
    return result


def _sequence(values: Tensor, decay_half_life_tokens: float) -> Tensor:
    positions = torch.arange(values.shape[0], dtype=torch.float64, device=values.device)
    distance = positions[None, :] - positions[:, None]
    decay = torch.exp2(-distance.clamp(min=0) / decay_half_life_tokens)
    return torch.where(distance >= 0, decay * values[None, :], 0.0).sum(dim=1)
