"""Leaves out prompts that came before, in the same source or in one before it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_fipo.data.source import Source


def skip_duplicates(sources: Sequence[Source]) -> None:
    """Keep the first row of every content key over all sources, in their order; skip the others as duplicates."""
    places = [source.places for source in sources]
    firsts = _first_of_each(np.concatenate([source.rows.index.keys[source.places] for source in sources]))
    starts = np.cumsum([0, *map(len, places)])
    for number, source in enumerate(sources):
        own = slice(starts[number], starts[number + 1])
        repeats = firsts[own] != np.arange(starts[number], starts[number + 1])
        if not repeats.any():
            continue
        first = firsts[own][repeats][0]
        owner = int(np.searchsorted(starts, first, side="right")) - 1
        row = sources[owner].row_number(int(places[owner][first - starts[owner]]))
        source.skip(places[number][repeats], "duplicate", f"the prompt of {sources[owner].name}:{row}")


def _first_of_each(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """[N] int64: for each of the [N, 2] keys, where the first equal one stands."""
    # Stable: of equal keys the first row comes first.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = np.empty(len(keys), dtype=np.int64)
    firsts[order] = order[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
    return firsts
