"""The Future-KL twice over, written for reading and for tests: its definition, and its recurrence. Float64, CPU speed.

Both take sequences end to end or one a row, and a constant decay γ = 2^(−1/τ) or one for every token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def future_kl(
    log_ratio: Tensor,
    decay_half_life_tokens: float,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Future-KL by its definition, F_t = Σ_{k≥t} γ^(k−t) Δ_k inside every sequence (eq. 6, arXiv:2603.19835).

    Quadratic in time and memory.

    Args:
        log_ratio: [T] sequences end to end, or [B, T] one sequence a row; zero on tokens that take no part.
        decay_half_life_tokens: τ, with γ = 2^(−1/τ); may be infinite.
        cu_seqlens: Starts of the sequences of a [T] input, and its end; None for a single one.
        decay: The shape of `log_ratio`, a decay γ_t for every token instead of γ: γ^(k−t) becomes γ_t·γ_{t+1}⋯γ_{k−1}.

    Returns:
        The shape of `log_ratio`, float64.
    """

    def definition(values: Tensor, decays: Tensor) -> Tensor:
        positions = torch.arange(values.shape[0], device=values.device)
        distance = positions[None, :] - positions[:, None]
        if decay is None:
            weights = torch.exp2(-distance.clamp(min=0).double() / decay_half_life_tokens)
        else:
            # Column k of row t has the product of the decays before it, from t on.
            factors = torch.where(distance > 0, decays.roll(1)[None, :], 1.0)
            weights = factors.cumprod(dim=1)
        return torch.where(distance >= 0, weights * values[None, :], 0.0).sum(dim=1)

    return _by_sequence(definition, log_ratio, cu_seqlens, decay)


def future_kl_by_recurrence(
    log_ratio: Tensor,
    decay_half_life_tokens: float,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """The same by F_t = Δ_t + γ_t·F_{t+1}, token by token from the end: linear, for lengths the definition cannot do.

    Args and result as for `future_kl`.
    """
    constant = 2.0 ** (-1.0 / decay_half_life_tokens)

    def recurrence(values: Tensor, decays: Tensor) -> Tensor:
        sums = values.tolist()
        factors = [constant] * len(sums) if decay is None else decays.tolist()
        for token in range(len(sums) - 2, -1, -1):
            sums[token] += factors[token] * sums[token + 1]
        return torch.tensor(sums, dtype=torch.float64, device=values.device)

    return _by_sequence(recurrence, log_ratio, cu_seqlens, decay)


def _by_sequence(
    function: Callable[[Tensor, Tensor], Tensor],
    log_ratio: Tensor,
    cu_seqlens: Tensor | Sequence[int] | None,
    decay: Tensor | None,
) -> Tensor:
    values = log_ratio.detach().double()
    decays = torch.ones_like(values) if decay is None else decay.detach().double()
    if values.dim() == 2:
        return torch.stack([function(*row) for row in zip(values, decays, strict=True)])
    bounds = [0, values.shape[0]] if cu_seqlens is None else [int(bound) for bound in cu_seqlens]
    result = torch.zeros_like(values)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        result[start:end] = function(values[start:end], decays[start:end])
    return result
