"""Files do not depend on ranks, and ranks share them evenly."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.trainer.convert.shares import cut_into_files


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 150))
def test_files_hold_everything_once_in_order(sizes: list[int], limit: int) -> None:
    files = cut_into_files(sizes, limit)
    assert [number for places in files for number in places] == list(range(len(sizes)))
    for places in files:
        assert len(places) == 1 or sum(sizes[number] for number in places) <= limit
    for one, other in zip(files, files[1:], strict=False):
        assert sum(sizes[number] for number in (*one, other[0])) > limit, "these would have had room in one"
