"""Sets prompts of the training sources aside for evaluation, by their content alone."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.problem import UnusableRow
from megatron_fipo.data.source import Source
from megatron_fipo.types import Prompt

_FIELD = "data.held_out"


class HeldOut:
    """Prompts that are never drawn for training.

    A row's content key, which is as good as random, decides: a fraction holds out the keys below that fraction of all
    possible ones, a number holds out the lowest. So what is held out does not depend on the order of rows or sources,
    and rows that are appended later never bring a prompt that was trained on into the held-out set: a fraction's set
    only grows, a number's only takes new rows.

    Args:
        sources: The training sources; the rows that are held out are taken out of their `places`.
        wanted: Number, or fraction below 1.

    Raises:
        ConfigError: There are not that many usable prompts, or none is held out, or a source has none left.
    """

    def __init__(self, sources: Sequence[Source], wanted: int | float) -> None:
        self._sources = sources
        ranks = np.concatenate([source.ranks for source in sources])
        # Equal prompts have equal ranks: where duplicates are kept, all of them are held out, and one is tried.
        ranks, firsts = np.unique(ranks, return_index=True)
        self._owners = np.repeat(np.arange(len(sources)), [len(source.places) for source in sources])[firsts]
        self._places = np.concatenate([source.places for source in sources])[firsts]
        if isinstance(wanted, float):
            size = int(np.searchsorted(ranks, np.uint64(int(wanted * 2.0**64))))
        else:
            size = self._size_of(wanted)
        self._owners, self._places = self._owners[:size], self._places[:size]
        if not self.prompts(limit=1):
            raise _refusal(wanted, f"holds out no usable prompt of the {len(ranks):,} training prompts")
        for source in sources:
            source.places = source.places[source.ranks > ranks[size - 1]]
            if next(_usable(source, source.places), None) is None:
                raise _refusal(wanted, f"leaves no usable training prompt in {source.origin}")

    def prompts(self, limit: int | None = None) -> tuple[Prompt, ...]:
        """The prompts source by source, those of a source in an order that is as good as random.

        Args:
            limit: Prompts of each source at most; None for all.
        """
        found: list[Prompt] = []
        for owner, source in enumerate(self._sources):
            found += itertools.islice(_usable(source, self._places[self._owners == owner]), limit)
        return tuple(found)

    def _size_of(self, wanted: int) -> int:
        """How many of the rows in order have `wanted` usable prompts among them."""
        found = 0
        for number, (owner, place) in enumerate(zip(self._owners, self._places, strict=True), start=1):
            found += any(_usable(self._sources[owner], [place]))
            if found == wanted:
                return number
        raise _refusal(wanted, f"must not exceed the {found:,} usable prompts of data.train")


def _usable(source: Source, places: Iterable[np.int64]) -> Iterator[Prompt]:
    for place in places:
        try:
            yield source.prompt(int(place))
        except UnusableRow:
            continue


def _refusal(wanted: int | float, rule: str) -> ConfigError:
    return ConfigError(_FIELD, wanted, rule, "hold out a number that the training prompts have room for")
