"""The Future-KL on CUDA in one pass over memory, as a Triton kernel; where Triton is missing, `scan` serves.

`kernel_programs` holds what runs on the device. All sums are float64 and are rounded once, to the result's dtype. The
plan of a launch follows from lengths that the host knows and is remembered, so that nothing waits for the device.

Checked on the CPU by Triton's interpreter and compiled for compute capability 9.0; it has never run on a GPU.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from megatron_fipo.algorithms.future_kl.segments import SegmentPlan
from megatron_fipo.config.algorithm import SAFE_WEIGHT_FLOOR, FipoConfig
from megatron_fipo.parallel.layout import copy_to

TILE = 2048
"""Tokens of one program; a power of two."""

NUM_WARPS = 8

SMALLEST_EXPONENT = -1075
"""2 to this power rounds to zero in float64."""


def can_run(values: Tensor) -> bool:
    """Whether these values are on a CUDA device, fit 32-bit offsets, and Triton is installed."""
    return values.is_cuda and values.numel() < 2**31 - TILE and _has_triton()


def segmented_reverse_sum(
    values: Tensor,
    half_life: float,
    plan: SegmentPlan,
    following: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    *,
    tile: int = TILE,
) -> Tensor:
    """Sum from the right with decay inside every segment, as `scan.segmented_reverse_sum`.

    Args:
        values: [T], any floating dtype.
        half_life: In tokens; may be infinite.
        plan: Where the segments lie.
        following: [S] float64, y of the token behind each segment's last; zero by default.
        dtype: What the sums, taken in float64, are rounded to.
        tile: Tokens of one program, a power of two.

    Returns:
        [T] of `dtype`, without gradient.
    """
    from megatron_fipo.algorithms.future_kl.kernel_programs import sum_kernel

    values = values.detach().contiguous()
    sums = torch.empty_like(values, dtype=dtype)
    if plan.num_values == 0:
        return sums
    num_tiles = -(-plan.num_values // tile)
    with _launching_on(values.device):
        sum_kernel[(num_tiles,)](
            values,
            values if following is None else following.contiguous(),
            plan.bounds,
            _tile_segments(plan, tile),
            _clean_state(values.device, num_tiles),
            sums,
            plan.num_values,
            num_tiles,
            _horizon(half_life, tile),
            gamma=2.0 ** (-1.0 / half_life),
            inverse_half_life=1.0 / half_life,
            has_following=following is not None,
            tile_size=tile,
            num_warps=NUM_WARPS,
        )
    return sums


def segment_heads(values: Tensor, half_life: float, plan: SegmentPlan, *, tile: int = TILE) -> Tensor:
    """What `segmented_reverse_sum` gives for the first value of every segment, as `scan.segment_heads`.

    Reads the values and writes nothing else.

    Args:
        values: [T], any floating dtype.
        half_life: In tokens; may be infinite.
        plan: Where the segments lie.
        tile: Tokens of one program, a power of two.

    Returns:
        [S] float64, zero where a segment is empty.
    """
    from megatron_fipo.algorithms.future_kl.kernel_programs import head_kernel

    values = values.detach().contiguous()
    heads = torch.zeros(len(plan.lengths), dtype=torch.float64, device=values.device)
    if plan.num_values == 0:
        return heads
    num_tiles = -(-plan.num_values // tile)
    with _launching_on(values.device):
        head_kernel[(num_tiles,)](
            values,
            plan.bounds,
            _tile_segments(plan, tile),
            _clean_state(values.device, num_tiles),
            heads,
            plan.num_values,
            num_tiles,
            _horizon(half_life, tile),
            gamma=2.0 ** (-1.0 / half_life),
            inverse_half_life=1.0 / half_life,
            tile_size=tile,
            num_warps=NUM_WARPS,
        )
    return heads


def fused_influence(
    log_ratio: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    config: FipoConfig,
    plan: SegmentPlan,
    following: Tensor | None = None,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Participation, Future-KL, influence weight and dual-clip count in one pass (eqs. 5–7, arXiv:2603.19835).

    The same as `influence.participating_log_ratio`, a Future-KL with the constant decay, and
    `influence.influence_weights`. Inputs are read once, results written once.

    Args:
        log_ratio: [T] float32 or float64, clamped, zero outside the response.
        ratio: [T], its exponential, in the same dtype. Not computed here: another exponential could decide otherwise at
            the safety threshold.
        advantages: [T] floating, arbitrary outside the response.
        config: The rules.
        plan: Where the S segments lie: sequences, or a rank's chunks of them.
        following: [S] float64, Future-KL of the token behind each segment's last; zero by default.
        tile: Tokens of one program, a power of two.

    Returns:
        Future-KL [T] and weights [T] in the dtype of `log_ratio`, and for every segment its tokens beyond the dual clip
        with a negative advantage, [S] int64. None has a gradient.
    """
    from megatron_fipo.algorithms.future_kl.kernel_programs import influence_kernel

    log_ratio = log_ratio.detach().contiguous()
    future_kl, weights = torch.empty_like(log_ratio), torch.empty_like(log_ratio)
    num_segments = len(plan.lengths)
    if plan.num_values == 0:
        return future_kl, weights, torch.zeros(num_segments, dtype=torch.int64, device=log_ratio.device)
    counts = torch.empty(num_segments, dtype=torch.int64, device=log_ratio.device)
    num_tiles = -(-plan.num_values // tile)
    half_life = config.decay_half_life_tokens
    with _launching_on(log_ratio.device):
        influence_kernel[(num_tiles,)](
            log_ratio,
            ratio.detach().contiguous(),
            advantages.detach().contiguous(),
            log_ratio if following is None else following.contiguous(),
            plan.bounds,
            _tile_segments(plan, tile),
            _clean_state(log_ratio.device, num_tiles + num_segments),
            future_kl,
            weights,
            counts,
            plan.num_values,
            num_tiles,
            num_segments,
            _horizon(half_life, tile),
            gamma=2.0 ** (-1.0 / half_life),
            inverse_half_life=1.0 / half_life,
            log_dual_clip=math.inf if config.dual_clip is None else math.log(config.dual_clip),
            clip_low=float(config.influence_clip_low),
            clip_high=float(config.influence_clip_high),
            safety_threshold=float(config.safety_threshold),
            safe_floor=SAFE_WEIGHT_FLOOR,
            participation=config.participation_mask,
            include_current_token=config.include_current_token,
            reset_risky=config.safety_mode == "reset",
            has_following=following is not None,
            tile_size=tile,
            num_warps=NUM_WARPS,
        )
    return future_kl, weights, counts


def _launching_on(device: torch.device) -> AbstractContextManager[object]:
    # Triton launches on the current device, wherever the arguments are.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _horizon(half_life: float, tile: int) -> int:
    """Tiles to look at behind a tile's end: further ones have decayed to zero."""
    reach = -SMALLEST_EXPONENT * half_life / tile
    return 1 + int(reach) if reach < 2**30 else 2**30


@lru_cache(maxsize=32)
def _tile_segments(plan: SegmentPlan, tile: int) -> Tensor:
    """For every tile the first segment with a token in it or behind its start, and the first one behind it."""
    ends = torch.tensor(list(accumulate(plan.lengths)), dtype=torch.int64)
    starts = ends - torch.tensor(plan.lengths, dtype=torch.int64)
    tile_starts = torch.arange(0, plan.num_values, tile)
    first = torch.searchsorted(ends, tile_starts, right=True)
    stop = torch.searchsorted(starts, tile_starts + tile)
    return copy_to(torch.stack([first, stop], dim=1).int(), plan.bounds.device)


def _clean_state(device: torch.device, num_words: int) -> Tensor:
    """The words that the programs of one launch share, all EMPTY: [2 + num_words or more] int64.

    A launch leaves them as it found them, so that the next one on the same stream takes them without a fill. In a
    CUDA graph, which may be replayed on any stream, they are the graph's own.
    """
    num_words += 2
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _new_state(device, num_words)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _state_of_stream(device, stream, max(4096, 1 << (num_words - 1).bit_length()))


@lru_cache(maxsize=64)
def _state_of_stream(device: torch.device, stream: int, num_words: int) -> Tensor:
    return _new_state(device, num_words)


def _new_state(device: torch.device, num_words: int) -> Tensor:
    return torch.full((num_words,), -1, dtype=torch.int64, device=device)
