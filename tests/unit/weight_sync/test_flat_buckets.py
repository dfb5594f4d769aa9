"""Buffers of several types, read back as SGLang reads them: with nothing but names, types and shapes in order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.weight_sync.flat_buckets import fill_buffer, plan_buffer, view_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.float64)


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_a_receiver_finds_every_tensor_by_adding_up_sizes(contents):
    tensors = {f"t{number}": (torch.rand(shape) * 100).to(dtype) for number, (dtype, shape) in enumerate(contents)}
    places = plan_buffer(tensors)
    # Longer than needed, as a buffer that is used again.
    buffer = torch.full((places[-1].end + 3,), 255, dtype=torch.uint8)
    fill_buffer(buffer, places, tensors)
    start = 0
    for place in places:
        empty = torch.empty(place.shape, dtype=getattr(torch, place.dtype_name))
        assert start % empty.element_size() == 0, "not aligned"
        found = buffer[start : start + empty.nbytes].view(empty.dtype).reshape(empty.shape)
        assert torch.equal(found.float(), tensors[place.name].float())
        assert torch.equal(view_tensor(buffer, place).float(), found.float())
        start += empty.nbytes
    assert sorted(place.name for place in places) == sorted(tensors)


def test_equally_wide_tensors_keep_their_order():
    tensors = {name: torch.zeros(2, dtype=torch.bfloat16) for name in "dacb"} | {"wide": torch.zeros(1)}
    assert [place.name for place in plan_buffer(tensors)] == ["wide", "d", "a", "c", "b"]


def test_strided_tensors_are_sent_in_order():
    tensors = {"columns": torch.arange(6.0).reshape(2, 3).t(), "every other": torch.arange(8.0)[::2]}
    places = plan_buffer(tensors)
    buffer = torch.empty(places[-1].end, dtype=torch.uint8)
    fill_buffer(buffer, places, tensors)
    for place in places:
        assert torch.equal(view_tensor(buffer, place), tensors[place.name])
