"""The scan across ranks without processes: summaries of all ranks' chunks → fold → sums, for any cut of any lengths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fipo.algorithms.future_kl import reference
from megatron_fipo.algorithms.future_kl.context_parallel import (
    chunk_summaries,
    fold,
    future_kl,
    in_order_of_position,
    sums_from,
)
from megatron_fipo.parallel.layout import PackLayout
from tests.host_waits import NoHostWaits
from tests.layouts import layouts

HALF_LIVES = st.sampled_from([1e-3, 0.7, 8.0, 32.0, 256.0, 1e12, math.inf])
SEEDS = st.integers(0, 2**16)


def across_ranks(
    log_ratio: Tensor,
    half_life: float,
    layout: PackLayout,
    clipped: Tensor | None = None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`future_kl` of a whole pack, every rank's part from its own tokens and the summaries of all."""
    ranks = [layout.on_rank(rank) for rank in range(layout.cp_size)]

    def part(rank: PackLayout, values: Tensor | None) -> Tensor | None:
        return None if values is None else rank.shard(values)

    gathered = torch.stack(
        [
            chunk_summaries(rank.shard(log_ratio), half_life, rank, part(rank, clipped), part(rank, decay))
            for rank in ranks
        ]
    )
    chunks = in_order_of_position(gathered, layout)
    assert chunks.shape == (layout.num_sequences, layout.chunks_per_sequence, 3)
    parts = [sums_from(fold(chunks, rank), rank.shard(log_ratio), half_life, rank, part(rank, decay)) for rank in ranks]
    return layout.unshard(parts), chunks[..., 2].sum(dim=1).long()


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(values: Tensor, seed: int) -> Tensor:
    """With about a third of the tokens taking no part."""
    return values * (torch.rand(len(values), generator=torch.Generator().manual_seed(seed + 1)) < 0.7)


def test_the_example_of_the_page():
    layout = PackLayout((6,), cp_size=2)
    terms = torch.tensor([0, 0, 0, 1, -1, 0], dtype=torch.float64)
    clipped = torch.tensor([False] * 5 + [True])
    ranks = [layout.on_rank(rank) for rank in range(2)]
    summaries = [chunk_summaries(rank.shard(terms), 1.0, rank, rank.shard(clipped)) for rank in ranks]
    assert summaries[0].tolist() == [[[0, 0.5, 0], [-1, 0.25, 1]]]
    assert summaries[1].tolist() == [[[0, 0.25, 0], [1, 0.5, 0]]]
    assert [each.nbytes for each in summaries] == [48, 48]
    chunks = in_order_of_position(torch.stack(summaries), layout)
    assert [fold(chunks, rank).tolist() for rank in ranks] == [[[0.125, 0]], [[0.5, -1]]]
    sums, counts = across_ranks(terms, 1.0, layout, clipped)
    assert sums.tolist() == [0.0625, 0.125, 0.25, 0.5, -1, 0] and counts.tolist() == [1]


def magnitude(log_ratio: Tensor, half_life: float, layout: PackLayout, decay: Tensor | None = None) -> Tensor:
    """Σ γ^(k−t) |κ_k|, what rounding errors are proportional to."""
    return reference.future_kl_by_recurrence(log_ratio.abs(), half_life, layout.cu_seqlens, decay)


def draw_decay(count: int, seed: int) -> Tensor:
    """A decay for every token: a third exactly 0, a third exactly 1."""
    generator = torch.Generator().manual_seed(seed + 2)
    kinds = torch.randint(0, 3, (count,), generator=generator)
    return torch.where(kinds == 2, torch.rand(count, generator=generator, dtype=torch.float64), kinds.double())


@given(layout=layouts(), half_life=HALF_LIVES, seed=SEEDS)
@settings(max_examples=150)
def test_any_cut_of_any_lengths_equals_the_definition(layout, half_life, seed):
    log_ratio = masked(randn(layout.num_tokens, seed), seed)
    expected = reference.future_kl(log_ratio, half_life, layout.cu_seqlens)
    actual, _ = across_ranks(log_ratio, half_life, layout)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@given(layout=layouts(), seed=SEEDS)
@settings(max_examples=100)
def test_a_decay_for_every_token_equals_the_definition(layout, seed):
    log_ratio = masked(randn(layout.num_tokens, seed), seed)
    decay = draw_decay(layout.num_tokens, seed)
    expected = reference.future_kl(log_ratio, 32.0, layout.cu_seqlens, decay)
    actual, _ = across_ranks(log_ratio, 32.0, layout, decay=decay)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@given(layout=layouts(), half_life=HALF_LIVES, seed=SEEDS)
@settings(max_examples=40)
def test_equal_decays_are_the_constant_one(layout, half_life, seed):
    log_ratio = randn(layout.num_tokens, seed)
    decay = torch.full_like(log_ratio, 2.0 ** (-1.0 / half_life))
    actual, _ = across_ranks(log_ratio, half_life, layout, decay=decay)
    expected, _ = across_ranks(log_ratio, half_life, layout)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@given(layout=layouts(), half_life=st.sampled_from([0.7, 32.0, 256.0, math.inf]), seed=SEEDS)
@settings(max_examples=60)
def test_float32_is_within_eight_roundings(layout, half_life, seed):
    log_ratio = (randn(layout.num_tokens, seed) * 0.05).float()
    actual, _ = across_ranks(log_ratio, half_life, layout)
    assert actual.dtype == torch.float32
    error = (actual.double() - reference.future_kl(log_ratio, half_life, layout.cu_seqlens)).abs()
    assert bool((error <= 8 * torch.finfo(torch.float32).eps * magnitude(log_ratio, half_life, layout)).all())


@given(layout=layouts(), seed=SEEDS)
@settings(max_examples=40)
def test_clipped_tokens_are_counted_over_all_chunks(layout, seed):
    clipped = randn(layout.num_tokens, seed) > 0.5
    _, counts = across_ranks(torch.zeros(layout.num_tokens), 32.0, layout, clipped)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int(part.sum()) for part in clipped.split(layout.padded_lengths)]


@given(layout=layouts(), seed=SEEDS)
@settings(max_examples=40)
def test_a_vanishing_half_life_leaves_every_token_its_own(layout, seed):
    log_ratio = randn(layout.num_tokens, seed)
    assert torch.equal(across_ranks(log_ratio, 1e-3, layout)[0], log_ratio)


@given(layout=layouts(), seed=SEEDS)
@settings(max_examples=40)
def test_without_decay_whole_numbers_sum_up_exactly(layout, seed):
    log_ratio = randn(layout.num_tokens, seed).mul(8).round()
    parts = [part.flip(0).cumsum(0).flip(0) for part in log_ratio.split(layout.padded_lengths)]
    assert torch.equal(across_ranks(log_ratio, math.inf, layout)[0], torch.cat(parts))


@given(
    prompts=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    cp_size=st.integers(1, 8),
    scheme=st.sampled_from(["zigzag", "contiguous"]),
    seed=SEEDS,
)
@settings(max_examples=60)
def test_a_prompt_of_any_length_changes_nothing(prompts, cp_size, scheme, seed):
    # The longer the prompt, the more chunks lie within it or begin in it.
    responses = [randn(length, seed) for length in (3, 70, 1, 12)[: len(prompts)]]
    layout = PackLayout(
        tuple(prompt + len(response) for prompt, response in zip(prompts, responses, strict=True)),
        cp_size,
        scheme=scheme,
    )
    pack = torch.cat(
        [torch.cat([torch.zeros(prompt), response]) for prompt, response in zip(prompts, responses, strict=True)]
    )
    result = across_ranks(pack, 8.0, layout)[0].split(layout.padded_lengths)
    for prompt, response, sums in zip(prompts, responses, result, strict=True):
        torch.testing.assert_close(sums[prompt:], reference.future_kl(response, 8.0), rtol=0, atol=1e-12)


@given(gap=st.integers(0, 60), cp_size=st.integers(1, 8), scheme=st.sampled_from(["zigzag", "contiguous"]), seed=SEEDS)
@settings(max_examples=60)
def test_masked_tokens_inside_a_response_count_as_distance(gap, cp_size, scheme, seed):
    first, second = randn(5, seed), randn(7, seed + 1)
    layout = PackLayout((12 + gap,), cp_size, scheme=scheme)
    sums = across_ranks(torch.cat([first, torch.zeros(gap), second]), 4.0, layout)[0]
    behind = reference.future_kl(second, 4.0)
    distance = gap + torch.arange(5, 0, -1, dtype=torch.float64)
    expected = reference.future_kl(first, 4.0) + 2.0 ** (-distance / 4.0) * behind[0]
    torch.testing.assert_close(sums[:5], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums[5 + gap :], behind, rtol=0, atol=1e-12)


@given(layout=layouts(), half_life=HALF_LIVES, seed=SEEDS)
@settings(max_examples=60)
def test_shifting_before_the_cut_leaves_no_trace_of_chunk_borders(layout, half_life, seed):
    # Log-ratios of the tokens themselves; entry p of the pack is about the token at p + 1.
    about_tokens = randn(layout.num_tokens, seed).split(layout.padded_lengths)
    shifted = torch.cat([torch.cat([each[1:], each.new_zeros(min(len(each), 1))]) for each in about_tokens])
    result = across_ranks(shifted, half_life, layout)[0].split(layout.padded_lengths)
    for each, sums in zip(about_tokens, result, strict=True):
        expected = reference.future_kl(each, half_life)[1:]
        torch.testing.assert_close(sums[:-1], expected, rtol=0, atol=1e-12)


@given(layout=layouts(), seed=SEEDS)
@settings(max_examples=60)
def test_packed_equals_padded_equals_row_by_row_in_any_order(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [randn(length, seed + index) for index, length in enumerate(layout.padded_lengths)]
    alone = [reference.future_kl(row, 32.0) for row in rows]
    order = torch.randperm(len(rows), generator=generator).tolist()
    longest = max(map(len, rows)) + 3
    padded = [torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows]
    cuts = {
        "packed": (range(len(rows)), rows),
        "in another order": (order, [rows[index] for index in order]),
        "padded": (range(len(rows)), padded),
    }
    for name, (places, members) in cuts.items():
        lengths = tuple(map(len, members))
        cut = PackLayout(lengths, layout.cp_size, scheme=layout.scheme)
        result = across_ranks(torch.cat(members), 32.0, cut)[0].split(lengths)
        for index, sums in zip(places, result, strict=True):
            torch.testing.assert_close(sums[: len(rows[index])], alone[index], rtol=0, atol=1e-12, msg=name)


@given(layout=layouts(), seed=SEEDS)
@settings(max_examples=30)
def test_without_context_parallelism_one_scan_is_all(layout, seed):
    log_ratio, clipped = randn(layout.num_tokens, seed), randn(layout.num_tokens, seed + 1) > 0
    whole = PackLayout(layout.padded_lengths)
    sums, counts = future_kl(log_ratio, 32.0, whole, None, clipped)
    torch.testing.assert_close(sums, across_ranks(log_ratio, 32.0, layout)[0], rtol=0, atol=1e-12)
    assert counts.tolist() == [int(part.sum()) for part in clipped.split(layout.padded_lengths)]


# The prompt of 1,000 tokens is masked; the lengths are no multiples of 16.
LONG = (131_072, 3, 20_011, 0, 4_099)


@pytest.mark.parametrize("scheme", ["zigzag", "contiguous"])
def test_long_sequences_over_eight_ranks_are_as_exact_as_stated(scheme):
    layout = PackLayout(LONG, 8, scheme=scheme)
    log_ratio = randn(layout.num_tokens, seed=1) * 0.05
    log_ratio[:1000] = 0.0
    for half_life, absolute in ((32.0, 5e-7), (256.0, 2e-5), (math.inf, None)):
        expected = reference.future_kl_by_recurrence(log_ratio, half_life, layout.cu_seqlens)
        scale = magnitude(log_ratio, half_life, layout)
        error = (across_ranks(log_ratio, half_life, layout)[0] - expected).abs()
        assert bool((error <= 1e-12 * scale.clamp(min=1.0)).all())
        rounded = log_ratio.float()
        expected = reference.future_kl_by_recurrence(rounded, half_life, layout.cu_seqlens)
        error = (across_ranks(rounded, half_life, layout)[0].double() - expected).abs()
        assert bool((error <= 8 * torch.finfo(torch.float32).eps * scale).all())
        assert absolute is None or float(error.max()) <= absolute


def test_a_long_sequence_with_a_decay_for_every_token():
    layout = PackLayout((131_072,), 8)
    log_ratio = randn(131_072, seed=2) * 0.05
    decay = torch.rand(131_072, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.02 + 0.98
    expected = reference.future_kl_by_recurrence(log_ratio, 1.0, layout.cu_seqlens, decay)
    actual, _ = across_ranks(log_ratio, 1.0, layout, decay=decay)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_no_gradient_flows():
    layout = PackLayout((5, 9), 2)
    log_ratio = torch.randn(layout.num_local_tokens, requires_grad=True)
    decay = torch.rand(layout.num_local_tokens, requires_grad=True)
    summaries = chunk_summaries(log_ratio, 32.0, layout, decay=decay)
    assert not summaries.requires_grad
    assert not chunk_summaries(log_ratio, 32.0, layout).requires_grad
    following = torch.zeros(2, 2, dtype=torch.float64)
    assert not sums_from(following, log_ratio, 32.0, layout).requires_grad
    assert not sums_from(following, log_ratio, 32.0, layout, decay).requires_grad


@pytest.mark.parametrize("scheme", ["zigzag", "contiguous"])
@pytest.mark.parametrize("with_decay", [False, True], ids=["constant", "for every token"])
def test_nothing_needs_a_value_on_the_host(scheme, with_decay):
    # Tensors on the meta device have no values: whatever asked for one would raise.
    layout = PackLayout((70, 0, 3, 200), 4, 1, scheme)
    log_ratio = torch.empty(layout.num_local_tokens, device="meta")
    clipped = torch.empty(layout.num_local_tokens, device="meta", dtype=torch.bool)
    decay = torch.empty_like(log_ratio) if with_decay else None
    with NoHostWaits():
        summaries = chunk_summaries(log_ratio, 32.0, layout, clipped, decay)
        chunks = in_order_of_position(torch.stack([summaries] * 4), layout)
        sums = sums_from(fold(chunks, layout), log_ratio, 32.0, layout, decay)
        whole = PackLayout(layout.padded_lengths)
        row_sums, counts = future_kl(torch.empty(273, device="meta"), 32.0, whole, None)
    assert sums.shape == log_ratio.shape and sums.is_meta
    assert row_sums.shape == (273,) and counts.shape == (4,)


@pytest.mark.parametrize("name", ["log_ratio", "clipped", "decay"])
def test_a_shape_that_does_not_fit_the_layout_is_refused(name):
    given = {"log_ratio": torch.zeros(7), "clipped": torch.zeros(7, dtype=torch.bool), "decay": torch.ones(7)}
    given[name] = given[name][:-1]
    with pytest.raises(ValueError, match=rf"{name}\.shape = \(6,\): the layout holds 7 tokens on this rank"):
        future_kl(decay_half_life_tokens=32.0, layout=PackLayout((3, 4)), group=None, **given)
