"""One source of prompts: its rows, which of them can be used, and how they become prompts."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import (
    JsonlPrompts,
    ParquetPrompts,
    PromptFormat,
    PromptSource,
    ReasoningGymPrompts,
    default_name,
)
from megatron_fipo.data.encoding import EncodingError, PromptEncoder
from megatron_fipo.data.jsonl import JsonlRows
from megatron_fipo.data.parquet import ParquetRows
from megatron_fipo.data.problem import Problem, SkipReason, UnusableRow
from megatron_fipo.data.reasoning_gym import ReasoningGymRows
from megatron_fipo.data.row_index import RowIndex, SkippedRows
from megatron_fipo.types import Prompt

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """The rows of a source, indexed; one is read when it is asked for.

    Attributes:
        index: The verdict on every row.
        description: How they are read, for the log.
        columns: Names of the columns; none where the rows have no such thing.
        digest: Digest of the content.
    """

    index: RowIndex
    description: str
    columns: tuple[str, ...]
    digest: str

    def read(self, place: int) -> Problem:
        """The usable row at a place, from 0."""
        ...


@dataclass(slots=True, kw_only=True)
class Source:
    """A source and the places of the rows that may be drawn.

    Attributes:
        config: The source's configuration.
        field: Where it lies in the configuration, such as data.train or data.train.1.
        rows: Its rows.
        encoder: Turns them into tokens.
        places: [U] int64, ascending: rows that may be drawn, unless their length forbids it.
    """

    config: PromptSource
    field: str
    rows: Rows
    encoder: PromptEncoder
    places: npt.NDArray[np.int64]

    @property
    def name(self) -> str:
        """The source's name."""
        return self.config.name or default_name(self.config)

    @property
    def origin(self) -> str:
        """Field and value that say where the prompts come from, for messages."""
        key, value = _origin(self.config)
        return f"{self.field}.{key} = {value}"

    @property
    def ranks(self) -> npt.NDArray[np.uint64]:
        """[U] uint64, the rows that may be drawn in an order of their content alone, uniform in [0, 2**64)."""
        ranks: npt.NDArray[np.uint64] = self.rows.index.keys[self.places, 0]
        return ranks

    def row_number(self, place: int) -> int:
        """The number of a row in reports and prompt ids."""
        return place + self.rows.index.first_number

    def prompt(self, place: int) -> Prompt:
        """Read a row and turn it into tokens.

        Raises:
            UnusableRow: It cannot be turned into tokens, or into too few or too many.
        """
        problem = self.rows.read(place)
        try:
            text, token_ids = self.encoder.encode(problem.prompt)
        except EncodingError as error:
            raise UnusableRow("broken", str(error)) from error
        config, section = self.encoder.config, self.encoder.section
        if len(token_ids) == 0:
            raise UnusableRow("empty", "no tokens")
        if len(token_ids) < config.min_prompt_tokens:
            limit = f"{section}.min_prompt_tokens = {config.min_prompt_tokens}"
            raise UnusableRow("too_short", f"{len(token_ids)} tokens, {limit}")
        if len(token_ids) > config.max_prompt_tokens:
            limit = f"{section}.max_prompt_tokens = {config.max_prompt_tokens}"
            raise UnusableRow("over_long", f"{len(token_ids)} tokens, {limit}")
        return Prompt(
            id=f"{self.name}:{self.row_number(place)}",
            token_ids=token_ids,
            text=text,
            answer=problem.answer,
            source=self.name,
            metadata=problem.metadata,
        )

    def prompts(self, skipped: dict[SkipReason, SkippedRows]) -> Iterator[Prompt]:
        """The prompts in the source's order; rows that turn out unusable are added to `skipped`."""
        for place in map(int, self.places):
            try:
                yield self.prompt(place)
            except UnusableRow as error:
                skipped.setdefault(error.reason, SkippedRows()).add(self.row_number(place), error.detail)

    def first_prompts(self, count: int) -> list[Prompt]:
        """The first `count` prompts, or all where there are fewer.

        Raises:
            ConfigError: There is none.
        """
        skipped: dict[SkipReason, SkippedRows] = {}
        prompts = list(itertools.islice(self.prompts(skipped), count))
        if not prompts:
            raise self.unusable(skipped)
        return prompts

    def skip(self, places: npt.NDArray[np.int64], reason: SkipReason, detail: str) -> None:
        """Leave out some of `places`; `detail` says what is wrong with the first."""
        self.rows.index.skip(places, reason, detail)
        self.places = self.rows.index.usable

    def report(self) -> None:
        """Log how the rows are read, and which are skipped for which reason.

        Raises:
            ConfigError: No row can be used.
        """
        index = self.rows.index
        if not len(self.places):
            raise self.unusable({})
        counts = f"{index.num_rows:,} rows, {len(self.places):,} of them usable"
        logger.info("%s: %s; %s", self.origin, self.rows.description, counts)
        self.warn(index.skipped)

    def warn(self, skipped: Mapping[SkipReason, SkippedRows]) -> None:
        """Log which rows are skipped for which reason."""
        for reason, rows in skipped.items():
            logger.warning("%s: skipped %s", self.origin, rows.describe(reason))

    def unusable(self, skipped_later: Mapping[SkipReason, SkippedRows]) -> ConfigError:
        """The error that no row can be used."""
        skipped = [*self.rows.index.skipped.items(), *skipped_later.items()]
        reasons = "; ".join(rows.describe(reason) for reason, rows in skipped) or "it is empty"
        key, value = _origin(self.config)
        if isinstance(self.config, ReasoningGymPrompts):
            return ConfigError(
                f"{self.field}.{key}", value, f"makes no usable prompt ({reasons})", "choose another task"
            )
        if self.config.answer_pattern is not None and {reason for reason, _ in skipped} == {"no_answer"}:
            key, value = "answer_pattern", self.config.answer_pattern
        return ConfigError(
            field=f"{self.field}.{key}",
            value=value,
            rule=f"gives no usable prompt ({reasons}); the columns are {', '.join(self.rows.columns) or 'unknown'}",
            way_out="correct the file, or say with prompt_field, answer_field and answer_pattern how to read it",
        )


def _origin(config: PromptSource) -> tuple[str, Any]:
    return ("task", config.task) if isinstance(config, ReasoningGymPrompts) else ("path", config.path)


def open_sources(
    given: PromptSource | tuple[PromptSource, ...], config: PromptFormat, tokenizer: PreTrainedTokenizerBase, field: str
) -> list[Source]:
    """Index one source or several.

    Args:
        given: Where the prompts come from.
        config: How they become tokens.
        tokenizer: The model's tokenizer.
        field: Where the sources lie in the configuration, such as data.train; for messages.

    Raises:
        ConfigError: A source cannot be read, or the format does not suit the tokenizer.
    """
    encoder = PromptEncoder(tokenizer, config, section=field.rpartition(".")[0])
    if not isinstance(given, tuple):
        return [_open_source(given, encoder, field)]
    return [_open_source(source, encoder, f"{field}.{place}") for place, source in enumerate(given)]


def _open_source(config: PromptSource, encoder: PromptEncoder, field: str) -> Source:
    rows: Rows
    if isinstance(config, JsonlPrompts):
        rows = JsonlRows(config, field)
    elif isinstance(config, ParquetPrompts):
        rows = ParquetRows(config, field)
    else:
        rows = ReasoningGymRows(config, field)
    return Source(config=config, field=field, rows=rows, encoder=encoder, places=rows.index.usable)
