"""The Future-KL kernel under Triton's interpreter; `test_future_kl_kernel.py` runs this file in a process of its own.

The interpreter is chosen by an environment variable when the kernel is first imported, for good. It takes about 0.05 s
a tile, and runs the tiles one after another.
"""

import math

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithms.future_kl import kernel
from megatron_fipo.algorithms.future_kl.segments import segment_plan
from megatron_fipo.config.algorithm import FipoConfig
from tests.kernel_checks import adversarial, check_influence, check_sums, log_ratios

CPU = torch.device("cpu")
TILE = 16
AROUND_TILES = (0, 1, TILE - 1, TILE, TILE + 1, 0, 3 * TILE, 0)


def test_the_interpreter_runs() -> None:
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("half_life", [1e-3, 0.5, 32.0, 256.0, math.inf])
def test_sums_around_whole_tiles(half_life: float) -> None:
    check_sums(log_ratios(sum(AROUND_TILES), seed=0), AROUND_TILES, half_life, tile=TILE)


@given(
    lengths=st.lists(st.integers(0, 40) | st.sampled_from([31, 32, 33]), min_size=1, max_size=5),
    half_life=st.sampled_from([0.01, 0.7, 32.0, 256.0, 1e12, math.inf]),
    seed=st.integers(0, 2**16),
    follows=st.booleans(),
)
@settings(max_examples=15)
def test_sums_of_any_lengths(lengths: list[int], half_life: float, seed: int, follows: bool) -> None:
    following = log_ratios(len(lengths), seed + 1) if follows else None
    check_sums(log_ratios(sum(lengths), seed), lengths, half_life, tile=32, following=following)


@pytest.mark.parametrize("half_life", [0.7, math.inf])
def test_a_segment_of_more_tiles_than_are_waited_for_at_a_time(half_life: float) -> None:
    lengths = (5, 70 * 8, 9)
    check_sums(log_ratios(sum(lengths), seed=1), lengths, half_life, tile=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_values_are_summed_in_high_precision(dtype: torch.dtype) -> None:
    values = log_ratios(150, seed=2, dtype=dtype, spread=0.05)
    check_sums(values, (150,), 256.0, tile=64)
    check_sums(values, (150,), 256.0, tile=64, dtype=torch.float32)


def test_no_decay_is_exact() -> None:
    counted = check_sums(torch.ones(300), (300,), math.inf, tile=64, dtype=torch.float32)
    assert counted.tolist() == list(range(300, 0, -1))


@pytest.mark.parametrize("mode", ["clamp", "reset"])
@pytest.mark.parametrize("participation", ["all_tokens", "negative_advantage", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_influence(mode: str, participation: str, dtype: torch.dtype) -> None:
    config = FipoConfig(
        participation_mask=participation, safety_mode=mode, safety_threshold=3.0, influence_clip_low=0.8
    )
    lengths = (70, 0, 1, 64, 57)
    following = log_ratios(len(lengths), seed=3, spread=0.1)
    log_ratio, advantages = adversarial(sum(lengths), config, 4, dtype)
    check_influence(log_ratio, advantages, lengths, config, tile=64, following=following)


@pytest.mark.parametrize(
    "config",
    [
        FipoConfig.preset("official-32b"),
        FipoConfig.preset("official-7b"),
        FipoConfig(influence_clip_low=0.0, influence_clip_high=10.0, safety_threshold=1.0, include_current_token=False),
        FipoConfig(dual_clip=None, sequence_drop=False, participation_mask="none", safety_threshold=math.inf),
        FipoConfig(participation_mask="none", decay_half_life_tokens=math.inf),
        FipoConfig(decay_half_life_tokens=0.5, influence_clip_low=0.0),
    ],
    ids=["32b", "7b", "exclusive", "no-dual-clip", "no-decay", "short"],
)
def test_influence_of_other_settings(config: FipoConfig) -> None:
    log_ratio, advantages = adversarial(200, config, 5, torch.float32)
    check_influence(log_ratio, advantages, (120, 80), config, tile=128)


def test_every_clipped_token_is_counted_once_and_in_its_own_segment() -> None:
    lengths = (0, 15, 1, 0, 16, 33, 0)
    log_ratio = torch.full((sum(lengths),), 3.0)
    check_influence(log_ratio, -torch.ones(sum(lengths)), lengths, FipoConfig(), tile=16)


def test_a_ratio_on_the_safety_threshold_is_not_above_it() -> None:
    log_ratio = torch.full((16,), 1.25)
    threshold = float(log_ratio.exp()[0])
    config = FipoConfig(safety_threshold=threshold, influence_clip_high=1.2, participation_mask="none")
    ratio = log_ratio.exp()
    ratio[8:] = torch.nextafter(ratio[8:], torch.full((8,), math.inf))
    _, weights, _ = kernel.fused_influence(log_ratio, ratio, -torch.ones(16), config, segment_plan((16,), CPU), tile=16)
    assert weights.tolist() == [float(torch.tensor(1.2))] * 8 + [1.0] * 8


def test_weights_that_overflow_end_at_the_bounds() -> None:
    config = FipoConfig(participation_mask="none", decay_half_life_tokens=math.inf, influence_clip_low=0.8)
    log_ratio = torch.full((32,), 20.0)
    log_ratio[16:] = -20.0
    _, weights, _ = kernel.fused_influence(
        log_ratio, log_ratio.exp(), torch.ones(32), config, segment_plan((16, 16), CPU), tile=16
    )
    torch.testing.assert_close(weights, torch.tensor([1.2] * 16 + [0.8] * 16), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_earlier_tokens_of_its_segment_alone(bad: float) -> None:
    log_ratio = torch.zeros(60)
    log_ratio[33] = bad
    future_kl, weights, _ = kernel.fused_influence(
        log_ratio,
        torch.ones(60),
        torch.ones(60),
        FipoConfig(participation_mask="none"),
        segment_plan((10, 30, 20), CPU),
        tile=16,
    )
    assert future_kl[10:34].isfinite().sum() == 0
    assert torch.equal(future_kl[:10], torch.zeros(10)) and torch.equal(future_kl[34:], torch.zeros(26))
    assert bool(weights[10:34].isnan().all()) == math.isnan(bad)


def test_a_nan_of_any_bits_is_published() -> None:
    values = torch.zeros(48, dtype=torch.float64)
    values[40] = torch.tensor(-1, dtype=torch.int64).view(torch.float64)
    sums = kernel.segmented_reverse_sum(values, math.inf, segment_plan((48,), CPU), tile=16)
    assert bool(sums[:41].isnan().all()) and torch.equal(sums[41:], values[41:])


def test_a_launch_leaves_its_state_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.full((64,), -1, dtype=torch.int64)
    monkeypatch.setattr(kernel, "_clean_state", lambda device, num_words: state)
    log_ratio = log_ratios(100, seed=6, dtype=torch.float32, spread=2.0)
    inputs = (log_ratio, log_ratio.exp(), -torch.ones(100), FipoConfig())
    first = kernel.fused_influence(*inputs, segment_plan((40, 0, 60), CPU), tile=16)
    assert first[2].sum() > 0
    kernel.segmented_reverse_sum(log_ratio, 8.0, segment_plan((100,), CPU), tile=32)
    assert torch.equal(state, torch.full_like(state, -1))
    again = kernel.fused_influence(*inputs, segment_plan((40, 0, 60), CPU), tile=16)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_nothing_in_nothing_out() -> None:
    none = torch.zeros(0)
    assert kernel.segmented_reverse_sum(none, 32.0, segment_plan((0, 0), CPU)).shape == (0,)
    assert kernel.segment_heads(none, 32.0, segment_plan((0, 0), CPU)).tolist() == [0.0, 0.0]
    future_kl, weights, counts = kernel.fused_influence(none, none, none, FipoConfig(), segment_plan((0, 0), CPU))
    assert future_kl.shape == weights.shape == (0,) and counts.tolist() == [0, 0]
