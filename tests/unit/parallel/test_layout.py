"""Every (rank, size, scheme) in one process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.parallel.layout import PackLayout, sequence_multiple, zigzag_chunk_numbers
from tests.layouts import layouts


def test_without_context_parallelism_nothing_moves():
    layout = PackLayout((3, 1, 4))
    assert layout.num_sequences == 3
    assert layout.num_tokens == layout.num_local_tokens == 8
    assert layout.chunks_per_sequence == 1
    assert layout.local_chunk_numbers == (0,)
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert layout.local_chunk_lengths == (3, 1, 4)
    assert layout.local_cu_chunks.tolist() == [0, 3, 4, 8]
    assert layout.local_indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert layout.local_sequence_ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert layout.local_positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


# Two sequences: 8 tokens from 0, 4 tokens from 8.
TWO_RANKS = {
    0: {
        "local_chunk_numbers": (0, 3),
        "local_chunk_lengths": (2, 2, 1, 1),
        "local_cu_chunks": [0, 2, 4, 5, 6],
        "local_indices": [0, 1, 6, 7, 8, 11],
        "local_sequence_ids": [0, 0, 0, 0, 1, 1],
        "local_positions": [0, 1, 6, 7, 0, 3],
    },
    1: {
        "local_chunk_numbers": (1, 2),
        "local_chunk_lengths": (2, 2, 1, 1),
        "local_cu_chunks": [0, 2, 4, 5, 6],
        "local_indices": [2, 3, 4, 5, 9, 10],
        "local_sequence_ids": [0, 0, 0, 0, 1, 1],
        "local_positions": [2, 3, 4, 5, 1, 2],
    },
}

# Two sequences: 16 tokens from 0, 8 tokens from 16.
FOUR_RANKS = {
    0: {"local_chunk_numbers": (0, 7), "local_indices": [0, 1, 14, 15, 16, 23]},
    1: {"local_chunk_numbers": (1, 6), "local_indices": [2, 3, 12, 13, 17, 22]},
    2: {"local_chunk_numbers": (2, 5), "local_indices": [4, 5, 10, 11, 18, 21]},
    3: {"local_chunk_numbers": (3, 4), "local_indices": [6, 7, 8, 9, 19, 20]},
}


@pytest.mark.parametrize(
    ("lengths", "cp_size", "ranks"), [((8, 4), 2, TWO_RANKS), ((16, 8), 4, FOUR_RANKS)], ids=["2 ranks", "4 ranks"]
)
def test_every_rank_holds_its_zigzag_chunks(lengths, cp_size, ranks):
    for rank, expected in ranks.items():
        layout = PackLayout(lengths, cp_size, rank)
        assert layout.num_tokens == sum(lengths)
        assert layout.num_local_tokens == sum(lengths) // cp_size
        for name, value in expected.items():
            actual = getattr(layout, name)
            assert (actual.tolist() if torch.is_tensor(actual) else actual) == value, (rank, name)


# Sequences of 3, 5 and 2 tokens, from 0, 3 and 8: no multiples of 4, one shorter than 2 · cp_size.
RAGGED = {
    ("zigzag", 0): {"local_chunk_lengths": (0, 1, 1, 2, 0, 1), "local_indices": [2, 3, 6, 7, 9]},
    ("zigzag", 1): {"local_chunk_lengths": (1, 1, 1, 1, 1, 0), "local_indices": [0, 1, 4, 5, 8]},
    ("contiguous", 0): {"local_chunk_lengths": (3, 2, 0), "local_indices": [0, 1, 2, 3, 4]},
    ("contiguous", 1): {"local_chunk_lengths": (0, 3, 2), "local_indices": [5, 6, 7, 8, 9]},
}


@pytest.mark.parametrize("scheme", ["zigzag", "contiguous"])
def test_ragged_lengths_are_cut_as_evenly_as_they_allow(scheme):
    for rank in (0, 1):
        layout = PackLayout((3, 5, 2), 2, rank, scheme)
        expected = RAGGED[scheme, rank]
        assert layout.local_chunk_lengths == expected["local_chunk_lengths"]
        assert layout.local_indices.tolist() == expected["local_indices"]


def test_contiguous_pieces_ignore_the_borders_of_sequences():
    pieces = [PackLayout((1, 10, 0, 2), 4, rank, "contiguous") for rank in range(4)]
    assert [piece.local_chunk_numbers for piece in pieces] == [(0,), (1,), (2,), (3,)]
    assert [piece.local_chunk_lengths for piece in pieces] == [(1, 2, 0, 0), (0, 3, 0, 0), (0, 3, 0, 0), (0, 2, 0, 2)]
    assert torch.cat([piece.local_indices for piece in pieces]).tolist() == list(range(13))
    assert pieces[3].local_sequence_ids.tolist() == [1, 1, 3, 3]
    assert pieces[3].local_positions.tolist() == [8, 9, 0, 1]


def test_starts_are_int32_and_indices_int64():
    layout = PackLayout((8, 4), 2, 1)
    assert layout.cu_seqlens.dtype == layout.local_cu_chunks.dtype == torch.int32
    for name in ("local_indices", "local_sequence_ids", "local_positions"):
        assert getattr(layout, name).dtype == torch.int64, name


def test_shard_and_unshard_by_hand():
    pack = torch.arange(12)
    shards = [PackLayout((8, 4), 2, rank).shard(pack) for rank in (0, 1)]
    assert shards[0].tolist() == [0, 1, 6, 7, 8, 11]
    assert shards[1].tolist() == [2, 3, 4, 5, 9, 10]
    assert PackLayout((8, 4), 2).unshard(shards).tolist() == pack.tolist()


@given(layouts(), st.sampled_from([(), (3,)]), st.sampled_from([torch.float64, torch.bool]))
def test_unshard_undoes_shard(layout, trailing, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(layout.num_tokens, *trailing, generator=generator, dtype=torch.float64)
    values = values > 0.5 if dtype == torch.bool else values
    ranks = [layout.on_rank(rank) for rank in range(layout.cp_size)]
    shards = [rank.shard(values) for rank in ranks]
    assert [len(shard) for shard in shards] == [rank.num_local_tokens for rank in ranks]
    assert torch.equal(layout.unshard(shards), values)


@given(layouts())
def test_every_token_lies_on_one_rank_in_order_of_position(layout):
    ranks = [layout.on_rank(rank) for rank in range(layout.cp_size)]
    together = torch.cat([rank.local_indices for rank in ranks])
    assert sorted(together.tolist()) == list(range(layout.num_tokens))
    assert together[layout.joined_rows].tolist() == list(range(layout.num_tokens))
    for rank in ranks:
        assert rank.local_indices.tolist() == sorted(rank.local_indices.tolist())
        assert len(rank.local_chunk_lengths) == layout.num_sequences * len(rank.local_chunk_numbers)
        assert rank.local_cu_chunks[-1] == rank.num_local_tokens


@given(layouts())
def test_chunks_follow_each_other_and_differ_by_one_token_at_most(layout):
    chunks = {}
    for rank in (layout.on_rank(rank) for rank in range(layout.cp_size)):
        per_sequence = len(rank.local_chunk_numbers)
        for index, indices in enumerate(rank.local_indices.split(rank.local_chunk_lengths)):
            chunks[index // per_sequence, rank.local_chunk_numbers[index % per_sequence]] = indices.tolist()
    for sequence, length in enumerate(layout.padded_lengths):
        parts = [chunks[sequence, number] for number in range(layout.chunks_per_sequence)]
        start = int(layout.cu_seqlens[sequence])
        assert sum(parts, []) == list(range(start, start + length))
        if layout.scheme == "zigzag":
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if layout.scheme == "contiguous":
        sizes = [layout.on_rank(rank).num_local_tokens for rank in range(layout.cp_size)]
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_equal_chunks_share_the_causal_work(cp_size, chunk_lengths):
    layout = PackLayout(tuple(length * sequence_multiple(cp_size) for length in chunk_lengths), cp_size)
    layout.require_equal_chunks()
    ranks = [layout.on_rank(rank) for rank in range(cp_size)]
    # A token attends to itself and to all before it.
    assert len({int((rank.local_positions + 1).sum()) for rank in ranks}) == 1
    assert len({rank.local_chunk_lengths for rank in ranks}) == 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (PackLayout((4, 6), 2), r"padded_lengths\[1\] = 6: must be a positive multiple of 4 .*; pad the sequence"),
        (PackLayout((4, 0)), r"padded_lengths\[1\] = 0: must be a positive multiple of 1"),
        (PackLayout((4,), 2, scheme="contiguous"), "scheme = 'contiguous': attention needs 'zigzag'"),
    ],
)
def test_attention_refuses_unequal_chunks(layout, message):
    with pytest.raises(ValueError, match=message):
        layout.require_equal_chunks()


def test_gradients_go_back_to_where_the_tokens_came_from():
    layout = PackLayout((4,), 2, 1)
    values = torch.ones(4, requires_grad=True)
    (layout.shard(values) * torch.tensor([10.0, 20.0])).sum().backward()
    assert values.grad.tolist() == [0.0, 10.0, 20.0, 0.0]


def test_an_empty_pack():
    layout = PackLayout((), 2, 1)
    assert layout.num_tokens == 0
    assert layout.cu_seqlens.tolist() == layout.local_cu_chunks.tolist() == [0]
    assert layout.local_indices.tolist() == layout.local_positions.tolist() == []


@pytest.mark.parametrize(("cp_size", "multiple"), [(1, 1), (2, 4), (3, 6), (4, 8)])
def test_sequence_multiple(cp_size, multiple):
    assert sequence_multiple(cp_size) == multiple
    numbers = [number for rank in range(cp_size) for number in zigzag_chunk_numbers(rank, cp_size)]
    assert sorted(numbers) == list(range(multiple))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,), 2, 2), r"cp_rank = 2: must lie in \[0, cp_size = 2\)"),
        (((4,), 2, -1), r"cp_rank = -1: must lie in \[0, cp_size = 2\)"),
        (((4, -1),), r"padded_lengths\[1\] = -1: must not be negative"),
        (((4,), 2, 0, "ring"), "scheme = 'ring': must be one of zigzag, contiguous"),
    ],
)
def test_an_impossible_layout_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackLayout(*arguments)


def test_values_of_another_size_are_refused():
    layout = PackLayout((8,), 2, 0)
    with pytest.raises(ValueError, match=r"values.shape\[0\] = 7: the pack has 8 tokens"):
        layout.shard(torch.zeros(7))
    with pytest.raises(ValueError, match=r"len\(shards\) = 3: the group has cp_size = 2 ranks"):
        layout.unshard([torch.zeros(4)] * 3)
