import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithms.future_kl import reference, scan
from megatron_fipo.algorithms.future_kl.segments import segment_plan
from tests.host_waits import NoHostWaits

HALF_LIVES = st.sampled_from([0.01, 0.7, 8.0, 32.0, 256.0, 1e12, math.inf])
RAGGED = st.lists(st.integers(0, 200) | st.sampled_from([31, 32, 33, 64, 65, 128]), max_size=6)


def packed(lengths: list[int], seed: int) -> tuple[torch.Tensor, list[int]]:
    cu_seqlens = [0]
    for length in lengths:
        cu_seqlens.append(cu_seqlens[-1] + length)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(cu_seqlens[-1], generator=generator, dtype=torch.float64), cu_seqlens


@given(lengths=RAGGED, half_life=HALF_LIVES, seed=st.integers(0, 2**16))
@settings(max_examples=80, deadline=None)
def test_scan_equals_the_definition(lengths, half_life, seed):
    log_ratio, cu_seqlens = packed(lengths, seed)
    expected = reference.future_kl(log_ratio, half_life, cu_seqlens)
    actual = scan.future_kl(log_ratio, half_life, cu_seqlens)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@given(lengths=RAGGED, half_life=HALF_LIVES, seed=st.integers(0, 2**16), with_decay=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_recurrence_equals_the_definition(lengths, half_life, seed, with_decay):
    log_ratio, cu_seqlens = packed(lengths, seed)
    decay = draw_decay(len(log_ratio), seed) if with_decay else None
    expected = reference.future_kl(log_ratio, half_life, cu_seqlens, decay)
    actual = reference.future_kl_by_recurrence(log_ratio, half_life, cu_seqlens, decay)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def draw_decay(count: int, seed: int) -> torch.Tensor:
    """A decay for every token: a third exactly 0, a third exactly 1."""
    generator = torch.Generator().manual_seed(seed + 1)
    kinds = torch.randint(0, 3, (count,), generator=generator)
    return torch.where(kinds == 2, torch.rand(count, generator=generator, dtype=torch.float64), kinds.double())


@given(lengths=RAGGED, seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_a_decay_for_every_token_equals_the_definition(lengths, seed):
    log_ratio, cu_seqlens = packed(lengths, seed)
    decay = draw_decay(len(log_ratio), seed)
    plan = segment_plan(tuple(lengths), torch.device("cpu"))
    sums, products = scan.segmented_reverse_scan(log_ratio, decay, plan)
    expected = reference.future_kl(log_ratio, 1.0, cu_seqlens, decay)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
    by_hand = [part.flip(0).cumprod(0).flip(0) for part in decay.split(lengths)]
    torch.testing.assert_close(products, torch.cat([products[:0], *by_hand]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decays_of_zero_and_one_are_exact(decay):
    values, _ = packed([3000], seed=9)
    values = (values * 8).round()
    plan = segment_plan((3000,), values.device)
    sums, products = scan.segmented_reverse_scan(values, torch.full_like(values, decay), plan)
    assert torch.equal(sums, values if decay == 0.0 else values.flip(0).cumsum(0).flip(0))
    assert torch.equal(products, torch.full_like(values, decay))


@given(lengths=RAGGED, half_life=HALF_LIVES, seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_what_follows_a_segment_is_decayed_by_its_distance(lengths, half_life, seed):
    values, cu_seqlens = packed(lengths, seed)
    following, _ = packed([len(lengths)], seed + 1)
    plan = segment_plan(tuple(lengths), values.device)
    actual = scan.segmented_reverse_sum(values, half_life, plan, following)
    alone = reference.future_kl(values, half_life, cu_seqlens)
    distance = torch.cat([values[:0], *(torch.arange(each, 0, -1, dtype=torch.float64) for each in lengths)])
    behind = following.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    torch.testing.assert_close(actual, alone + torch.exp2(-distance / half_life) * behind, rtol=0, atol=1e-12)
    heads = [float(part[0]) if len(part) else 0.0 for part in alone.split(lengths)]
    assert scan.segment_heads(values, half_life, plan).tolist() == pytest.approx(heads, rel=0, abs=1e-12)


@pytest.mark.parametrize("half_life", [32.0, math.inf])
def test_scan_equals_the_recurrence_over_four_levels_of_blocks(half_life):
    log_ratio, cu_seqlens = packed([3, 33_000, 4097], seed=1)
    expected = reference.future_kl_by_recurrence(log_ratio, half_life, cu_seqlens)
    torch.testing.assert_close(scan.future_kl(log_ratio, half_life, cu_seqlens), expected, rtol=0, atol=1e-10)


@given(length=st.integers(2, 300), cut=st.floats(0, 1), half_life=HALF_LIVES, seed=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_splitting_anywhere_and_carrying_the_head_changes_nothing(length, cut, half_life, seed):
    log_ratio, _ = packed([length], seed)
    split = 1 + int(cut * (length - 2))
    left, right = log_ratio[:split], log_ratio[split:]
    right_sums = scan.future_kl(right, half_life)
    distance = torch.arange(split, 0, -1, dtype=torch.float64)
    left_sums = scan.future_kl(left, half_life) + torch.exp2(-distance / half_life) * right_sums[0]
    whole = scan.future_kl(log_ratio, half_life)
    torch.testing.assert_close(torch.cat([left_sums, right_sums]), whole, rtol=0, atol=1e-12)


@given(length=st.integers(2, 300), place=st.floats(0, 1), half_life=HALF_LIVES)
@settings(max_examples=30, deadline=None)
def test_earlier_tokens_do_not_matter(length, place, half_life):
    log_ratio, _ = packed([length], seed=3)
    first = int(place * (length - 1))
    changed = log_ratio.clone()
    changed[:first] += 7.0
    whole = scan.future_kl(log_ratio, half_life)
    torch.testing.assert_close(scan.future_kl(changed, half_life)[first:], whole[first:], rtol=0, atol=1e-12)
    assert first == 0 or not torch.equal(scan.future_kl(changed, half_life)[:first], whole[:first])


def test_sequences_do_not_see_each_other():
    log_ratio, cu_seqlens = packed([70, 130], seed=4)
    changed = log_ratio.clone()
    changed[70:] = 1e3
    alone = scan.future_kl(log_ratio[:70], 32.0)
    assert torch.equal(scan.future_kl(changed, 32.0, cu_seqlens)[:70], alone)


def test_half_life_is_a_half_life():
    log_ratio = torch.zeros(101)
    log_ratio[100] = 1.0
    future_kl = scan.future_kl(log_ratio, 10.0)
    torch.testing.assert_close(future_kl[[100, 90, 80, 0]], torch.tensor([1.0, 0.5, 0.25, 2.0**-10]))


def test_no_decay_is_a_plain_suffix_sum():
    log_ratio, _ = packed([1000], seed=5)
    expected = log_ratio.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(scan.future_kl(log_ratio, math.inf), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(scan.future_kl(log_ratio, 1e15), expected, rtol=0, atol=1e-9)


def test_rows_are_sequences_of_equal_length():
    rows = torch.randn(5, 77, generator=torch.Generator().manual_seed(6))
    packed_rows = scan.future_kl(rows.reshape(-1), 8.0, [77 * i for i in range(6)])
    assert torch.equal(scan.future_kl(rows, 8.0), packed_rows.reshape(5, 77))
    torch.testing.assert_close(scan.future_kl(rows, 8.0).double(), reference.future_kl(rows, 8.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_input_is_summed_in_high_precision(dtype):
    log_ratio = (torch.randn(4000, generator=torch.Generator().manual_seed(7)) * 0.05).to(dtype)
    future_kl = scan.future_kl(log_ratio, 256.0)
    assert future_kl.dtype == torch.float32
    torch.testing.assert_close(
        future_kl, reference.future_kl_by_recurrence(log_ratio, 256.0).float(), rtol=1e-6, atol=1e-7
    )


def test_cu_seqlens_may_be_a_tensor_or_integers():
    log_ratio, cu_seqlens = packed([3, 0, 90], seed=8)
    as_tensor = scan.future_kl(log_ratio, 32.0, torch.tensor(cu_seqlens, dtype=torch.int32))
    assert torch.equal(as_tensor, scan.future_kl(log_ratio, 32.0, tuple(cu_seqlens)))


def test_nothing_in_nothing_out():
    assert scan.future_kl(torch.zeros(0), 32.0).shape == (0,)
    assert scan.future_kl(torch.zeros(0), 32.0, [0, 0, 0]).shape == (0,)
    assert scan.future_kl(torch.zeros(3, 0), 32.0).shape == (3, 0)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 100, 100, 4000]])
def test_nothing_needs_a_value_on_the_host(cu_seqlens):
    # Tensors on the meta device have no values: whatever asked for one would raise.
    with NoHostWaits():
        future_kl = scan.future_kl(torch.empty(4000, device="meta"), 32.0, cu_seqlens)
    assert future_kl.is_meta and future_kl.shape == (4000,)


@pytest.mark.parametrize(
    "operation",
    [
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.repeat_interleave(torch.ones(4, dtype=torch.int64)),
    ],
)
def test_the_check_for_waits_sees_them(operation):
    with pytest.raises(AssertionError, match="the host would wait"), NoHostWaits():
        operation(torch.ones(4))


def test_no_gradient_flows():
    log_ratio = torch.randn(10, requires_grad=True)
    assert not scan.future_kl(log_ratio, 32.0).requires_grad


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.nan])
def test_a_half_life_that_is_not_positive_is_refused(half_life):
    with pytest.raises(ValueError, match="decay_half_life_tokens = .*must be positive"):
        scan.future_kl(torch.zeros(4), half_life)


@pytest.mark.parametrize("cu_seqlens", [[0, 3], [1, 4], [0, 3, 2, 4], []])
def test_bounds_that_do_not_fit_are_refused(cu_seqlens):
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 4"):
        scan.future_kl(torch.zeros(4), 32.0, cu_seqlens)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"log_ratio.shape = \(2, 3, 4\)"):
        scan.future_kl(torch.zeros(2, 3, 4), 32.0)
