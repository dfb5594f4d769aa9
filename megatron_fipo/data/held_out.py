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
        # Ranks of one prompt are equal: sources that keep their duplicates hold out all of them.
        ranks = np.concatenate([source.ranks for source in sources])
        owners = np.repeat(np.arange(len(sources)), [len(source.places) for source in sources])
        places = np.concatenate([source.places for source in sources])
        _, first = np.unique(ranks, return_index=True)
        self._rows = list(zip(owners[first].tolist(), places[first].tolist(), strict=True))
        if isinstance(wanted, float):
            limit = np.uint64(int(wanted * 2.0**64))
            self._rows = self._rows[: int(np.searchsorted(ranks[first], limit))]
        else:
            size = self._size_of(wanted)
            limit = ranks[first][size] if size < len(first) else np.uint64(2**64 - 1)
            self._rows = self._rows[:size]
        self._check(wanted)
        for source in sources:
            source.places = source.places[source.ranks >= limit]
            if not len(source.places):
                raise _refusal(wanted, f"leaves no training prompt in {source.origin}")

    def prompts(self, limit: int | None = None) -> tuple[Prompt, ...]:
        """The prompts source by source, those of a source in an order that is as good as random.

        Args:
            limit: Prompts of each source at most; None for all.
        """
        found: list[Prompt] = []
        for number, source in enumerate(self._sources):
            places = (place for owner, place in self._rows if owner == number)
            found += itertools.islice(_usable(source, places), limit)
        return tuple(found)

    def _size_of(self, wanted: int) -> int:
        """How many of the rows in order have `wanted` usable prompts among them."""
        found = 0
        for size, (owner, place) in enumerate(self._rows, start=1):
            try:
                self._sources[owner].prompt(place)
            except UnusableRow:
                continue
            found += 1
            if found == wanted:
                return size
        raise _refusal(wanted, f"must not exceed the {found:,} usable prompts of data.train")

    def _check(self, wanted: int | float) -> None:
        if not self.prompts(limit=1):
            raise _refusal(wanted, f"holds out no usable prompt of the {len(self._rows)} it takes")


def _usable(source: Source, places: Iterable[int]) -> Iterator[Prompt]:
    for place in places:
        try:
            yield source.prompt(place)
        except UnusableRow:
            continue


def _refusal(wanted: int | float, rule: str) -> ConfigError:
    return ConfigError(_FIELD, wanted, rule, "hold out a number that the training prompts have room for")
