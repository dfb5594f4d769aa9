"""Packs as property tests draw them: ragged, of either scheme, cut for any number of ranks."""

from hypothesis import strategies as st

from megatron_fipo.parallel.layout import PackLayout

# Many are shorter than 2 · cp_size, so that chunks are empty; 31 to 65 lie about the scan's blocks.
RAGGED_LENGTHS = st.lists(
    st.integers(0, 20) | st.sampled_from([31, 32, 33, 63, 64, 65]) | st.integers(66, 300), min_size=1, max_size=6
)


@st.composite
def layouts(draw: st.DrawFn, largest_cp_size: int = 8) -> PackLayout:
    """A layout on rank 0; `on_rank` gives the others."""
    scheme = draw(st.sampled_from(["zigzag", "contiguous"]))
    return PackLayout(tuple(draw(RAGGED_LENGTHS)), draw(st.integers(1, largest_cp_size)), scheme=scheme)
