"""Rotary embedding of a packed batch in one go.

megatron-core's unfused version walks over the sequences of a pack in Python, for queries and keys of every layer: a
third of a small model's step on the CPU. Where every token is in its sequence depends on the lengths alone.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Put `apply_packed_rotary` in the place of megatron-core's loop."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_thd = apply_packed_rotary


def apply_packed_rotary(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
    multi_latent_attention: bool | None = None,
) -> Tensor:
    """Rotate every token by its position in its own sequence; same meaning and arguments as upstream.

    Args:
        t: [t, heads, size], this rank's zigzag part of every sequence.
        cu_seqlens: [N + 1] starts of the sequences over all context-parallel ranks.
        freqs: [S, 1, 1, size] angles by position; with as many rows as the pack has tokens, by place in the pack.
        rotary_interleaved: Pairs are neighbours instead of halves.
        mla_rotary_interleaved: The same for latent attention.
        mscale: Factor on sine and cosine.
        cp_group: Context-parallel group.
        multi_latent_attention: Older name of `mla_rotary_interleaved`.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    starts = tuple(cu_seqlens.tolist())
    runs_on = freqs.size(0) == starts[-1]
    positions = _positions(starts, cp_group.rank(), cp_group.size(), runs_on)
    rotated = _apply_rotary_pos_emb_bshd(
        t.unsqueeze(1),
        freqs.index_select(0, positions.to(freqs.device)),
        rotary_interleaved=rotary_interleaved,
        mla_rotary_interleaved=bool(multi_latent_attention or mla_rotary_interleaved),
        mscale=mscale,
    )
    return rotated.squeeze(1)


@lru_cache(maxsize=256)
def _positions(starts: tuple[int, ...], cp_rank: int, cp_size: int, runs_on: bool) -> Tensor:
    """Row of the angles for every local token: [t] int64."""
    pieces = []
    for first, stop in zip(starts[:-1], starts[1:], strict=True):
        base = first if runs_on else 0
        if cp_size == 1:
            pieces.append(torch.arange(base, base + stop - first))
            continue
        chunk = (stop - first) // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            pieces.append(torch.arange(base + number * chunk, base + (number + 1) * chunk))
    return torch.cat(pieces)
