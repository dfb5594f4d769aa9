"""The Future-KL kernel on a CUDA device, at the sizes it is for. Never run so far.

pytest -q tests/gpu/test_future_kl_cuda.py
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_fipo.algorithms.future_kl import kernel, reference, scan
from megatron_fipo.algorithms.future_kl.segments import SegmentPlan, segment_plan
from megatron_fipo.config.algorithm import FipoConfig
from tests.kernel_checks import adversarial, check_influence, check_sums, log_ratios

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not kernel._has_triton(), reason="needs Triton"),
]

TILE = kernel.TILE
PACKED = (20_000,) * 64
LONG = (131_072,)
RAGGED = (0, 1, TILE - 1, TILE, TILE + 1, 5, 0, 0, 40 * TILE, 131_072, 7, 3 * TILE + 2, 20_479)
CUDA = torch.device("cuda")


def plan_of(lengths: tuple[int, ...]) -> SegmentPlan:
    return segment_plan(lengths, CUDA)


@contextmanager
def no_host_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("half_life", [0.01, 0.5, 32.0, 256.0, math.inf])
@pytest.mark.parametrize("lengths", [PACKED, LONG, RAGGED], ids=["packed", "long", "ragged"])
def test_sums(lengths: tuple[int, ...], half_life: float) -> None:
    values = log_ratios(sum(lengths), seed=0, spread=0.05)
    following = log_ratios(len(lengths), seed=1)
    for dtype in (torch.float64, torch.float32):
        check_sums(
            values,
            lengths,
            half_life,
            tile=TILE,
            device="cuda",
            dtype=dtype,
            following=following,
            definition=reference.future_kl_by_recurrence,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_low_precision_values(dtype: torch.dtype) -> None:
    values = log_ratios(sum(RAGGED), seed=2, dtype=dtype, spread=0.05)
    check_sums(values, RAGGED, 256.0, tile=TILE, device="cuda", definition=reference.future_kl_by_recurrence)


def test_the_definition_on_the_device() -> None:
    lengths = (3000, 0, 1, 2047, 2048, 2049, 5000)
    check_sums(log_ratios(sum(lengths), seed=3), lengths, 256.0, tile=TILE, device="cuda")


@pytest.mark.parametrize("mode", ["clamp", "reset"])
@pytest.mark.parametrize("participation", ["all_tokens", "negative_advantage", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_influence(mode: str, participation: str, dtype: torch.dtype) -> None:
    config = FipoConfig(
        participation_mask=participation, safety_mode=mode, safety_threshold=3.0, influence_clip_low=0.8
    )
    log_ratio, advantages = adversarial(sum(RAGGED), config, 4, dtype)
    check_influence(
        log_ratio,
        advantages,
        RAGGED,
        config,
        tile=TILE,
        device="cuda",
        following=log_ratios(len(RAGGED), seed=5),
        definition=reference.future_kl_by_recurrence,
    )


def test_what_is_not_finite_reaches_earlier_tokens_of_its_segment_alone() -> None:
    lengths = (1000, 5000, 3000)
    log_ratio = torch.zeros(sum(lengths), device=CUDA)
    log_ratio[5500] = math.nan
    config = FipoConfig(decay_half_life_tokens=math.inf)
    ones = torch.ones_like(log_ratio)
    future_kl, weights, _ = kernel.fused_influence(log_ratio, ones, ones, config, plan_of(lengths))
    assert bool(future_kl[1000:5501].isnan().all()) and bool(weights[1000:5501].isnan().all())
    assert not bool(future_kl[:1000].any()) and not bool(future_kl[5501:].any())


def test_values_that_do_not_begin_on_a_whole_line() -> None:
    lengths = (5000, 1234)
    whole = log_ratios(sum(lengths) + 1, seed=6, dtype=torch.float32)
    exact = kernel.segmented_reverse_sum(whole[1:].cuda().clone(), 32.0, plan_of(lengths))
    assert torch.equal(kernel.segmented_reverse_sum(whole.cuda()[1:], 32.0, plan_of(lengths)), exact)


def test_the_public_scan_uses_the_kernel() -> None:
    values = log_ratios(5000, seed=7, dtype=torch.float32).cuda()
    expected = kernel.segmented_reverse_sum(values, 32.0, plan_of((5000,)), dtype=torch.float32)
    assert torch.equal(scan.future_kl(values, 32.0), expected)


def influence_inputs(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, FipoConfig, SegmentPlan]:
    config = FipoConfig.preset("official-7b")
    log_ratio, advantages = adversarial(sum(lengths), config, seed, torch.float32)
    log_ratio = log_ratio.cuda()
    return log_ratio, log_ratio.exp(), advantages.cuda(), config, plan_of(lengths)


def test_nothing_waits_for_the_device() -> None:
    inputs = influence_inputs((20_000,) * 8, seed=8)
    kernel.fused_influence(*inputs)
    kernel.segmented_reverse_sum(inputs[0], 32.0, plan_of((160_000,)))
    with no_host_wait():
        kernel.fused_influence(*inputs)
        # The plan of new lengths is made without waiting, too.
        kernel.segmented_reverse_sum(inputs[0], 32.0, plan_of((40_000,) * 4))


@pytest.mark.parametrize("lengths", [PACKED, LONG, RAGGED], ids=["packed", "long", "ragged"])
def test_repeats_to_the_bit(lengths: tuple[int, ...]) -> None:
    inputs = influence_inputs(lengths, seed=9)
    first = kernel.fused_influence(*inputs)
    different = torch.zeros((), dtype=torch.bool, device=CUDA)
    for _ in range(200):
        for one, other in zip(kernel.fused_influence(*inputs), first, strict=True):
            different |= (one != other).any()
    assert not bool(different)


def test_a_thousand_launches_beside_others_that_take_the_processors_away() -> None:
    """Tiles begin and end in many orders while other streams compete for the multiprocessors, in tiles of any size."""
    cases = []
    for seed, (lengths, tile) in enumerate([(PACKED, TILE), (LONG, 128), (RAGGED, 512), ((300_000,), 256)]):
        values = log_ratios(sum(lengths), seed, spread=0.05).cuda()
        expected = kernel.segmented_reverse_sum(values, math.inf, plan_of(lengths), tile=tile)
        cases.append((values, lengths, tile, expected))
    busy = torch.randn(2048, 2048, device=CUDA)
    streams = [torch.cuda.Stream() for _ in range(4)]
    different = [torch.zeros((), dtype=torch.bool, device=CUDA) for _ in streams]
    torch.cuda.synchronize()
    for turn in range(250):
        for number, stream in enumerate(streams):
            values, lengths, tile, expected = cases[(turn + number) % len(cases)]
            with torch.cuda.stream(stream):
                if (turn + number) % 3 == 0:
                    busy @ busy
                sums = kernel.segmented_reverse_sum(values, math.inf, plan_of(lengths), tile=tile)
                different[number] |= (sums != expected).any()
    torch.cuda.synchronize()
    assert not any(bool(each) for each in different)


def test_a_captured_graph_may_be_replayed_on_any_stream() -> None:
    inputs = influence_inputs((20_000,) * 8, seed=10)
    expected = kernel.fused_influence(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = kernel.fused_influence(*inputs)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                graph.replay()
        kernel.fused_influence(*inputs)
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
