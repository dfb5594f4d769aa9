"""Ranges of flattened tensors as boxes."""

import math
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.actor.checkpoint_shards import boxes

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4)


def test_a_range_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_beginning_of_one() -> None:
    assert list(boxes((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert list(boxes((4, 5), 6, 9)) == [((1, 1), (1, 3))]
    assert list(boxes((7,), 2, 5)) == [((2,), (3,))]
    assert list(boxes((), 0, 1)) == [((), ())]


@given(SHAPES, st.data())
def test_boxes_hold_the_range_in_its_order(shape: Sequence[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    whole = torch.arange(size).reshape(shape)
    found = list(boxes(shape, start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    values = [
        whole[tuple(slice(offset, offset + length) for offset, length in zip(*box, strict=True))].flatten()
        for box in found
    ]
    assert torch.cat(values).tolist() == list(range(start, stop))
