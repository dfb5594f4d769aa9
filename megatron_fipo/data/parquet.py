"""Rows of a Parquet file: judged in one pass, kept where they can be read one by one."""

import functools
import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import ParquetPrompts
from megatron_fipo.data.content_key import content_key, sole_text
from megatron_fipo.data.problem import Problem, UnusableRow
from megatron_fipo.data.row_index import RowIndex, RowScan
from megatron_fipo.data.schema import choose_schema

_ROWS_TO_RECOGNISE = 100
_ROWS_PER_BATCH = 8192
_BUFFER_BYTES = 2**20
_REMEMBERED_TEXTS = 2**15


class ParquetRows:
    """The rows of a file, numbered from 0.

    Parquet is compressed in groups of up to a million rows, so that reading one costs as much as reading all. The first
    `read` therefore copies prompt and answer of every row that is then still usable to an unnamed temporary file, from
    which rows are read when they are asked for. In memory are 25 bytes a row.

    Args:
        source: File and columns.
        field: Where the source lies in the configuration, such as data.train.

    Attributes:
        index: The verdict on every row.
        schema: Where prompt and answer stand.
        description: How the rows are read, for the log.
        columns: Names of the columns, nested ones with a dot between them.
        digest: SHA-256 of the file.

    Raises:
        ConfigError: The file cannot be read, or lacks a column.
    """

    def __init__(self, source: ParquetPrompts, field: str) -> None:
        self._source = source
        self._field = field
        self._copy: _Copy | None = None
        try:
            with source.path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
                self.columns: tuple[str, ...] = tuple(_column_names(pq.read_schema(file)))
            self.schema = choose_schema(source, self._first_rows())
            self._check_columns()
            self.description = f"read as {self.schema.name}"
            self.index = RowIndex(self._scan(), first_number=0)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def read(self, place: int) -> Problem:
        """Read the row at a place, from 0, which the index calls usable.

        Raises:
            ConfigError: The file cannot be read any more, or there is no room for the copy.
        """
        if self._copy is None:
            self._copy = self._copy_usable()
        prompt, answer = self._copy.read(place)
        return Problem(prompt=prompt, answer=answer)

    def _scan(self) -> RowScan:
        scan = RowScan()
        # Published sets repeat their rows a hundred times.
        key_of_text = functools.lru_cache(_REMEMBERED_TEXTS)(content_key)
        for batch in self._batches():
            for content in _contents(batch):
                try:
                    prompt, _ = self.schema.find(content)
                    text = prompt if isinstance(prompt, str) else sole_text(prompt)
                    scan.add_usable(content_key(prompt) if text is None else key_of_text(text))
                except UnusableRow as error:
                    scan.add_unusable(error.reason, error.detail)
        return scan

    def _copy_usable(self) -> "_Copy":
        places = self.index.usable
        try:
            copy, start = _Copy(), 0
            for batch in self._batches():
                first, last = np.searchsorted(places, [start, start + len(batch)])
                if first < last:
                    for content in _contents(batch.take(pa.array(places[first:last] - start))):
                        prompt, answer = self.schema.find(content)
                        copy.append((_without_nulls(prompt), answer))
                if last == len(places):
                    break
                start += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        copy.finish(places)
        return copy

    def _batches(self) -> Iterator[pa.RecordBatch]:
        # Buffered reading takes pages one by one, where otherwise a whole column of a row group is held.
        with pq.ParquetFile(self._source.path, buffer_size=_BUFFER_BYTES) as file:
            columns = [self.schema.prompt_field, self.schema.answer_field]
            yield from file.iter_batches(_ROWS_PER_BATCH, columns=columns)

    def _first_rows(self) -> list[Any]:
        with pq.ParquetFile(self._source.path, buffer_size=_BUFFER_BYTES) as file:
            batch = next(file.iter_batches(_ROWS_TO_RECOGNISE), None)
            return [] if batch is None else _contents(batch)

    def _check_columns(self) -> None:
        for name in ("prompt_field", "answer_field"):
            column = getattr(self.schema, name)
            if column not in self.columns:
                raise ConfigError(
                    field=f"{self._field}.{name}",
                    value=column,
                    rule=f"is not among the columns of {self._source.path}: {', '.join(self.columns)}",
                    way_out="name one of them",
                )

    def _unreadable(self, error: Exception) -> ConfigError:
        return ConfigError(
            field=f"{self._field}.path",
            value=self._source.path,
            rule=f"must be a Parquet file that can be read and copied to {tempfile.gettempdir()} ({error})",
            way_out="correct the path, fetch the file again, or set TMPDIR to a folder with room",
        )


class _Copy:
    """Prompts and answers of some rows in a temporary file that has no name and ends with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=_BUFFER_BYTES)
        self._ends = array("q", [0])

    def append(self, row: tuple[Any, str]) -> None:
        self._ends.append(self._ends[-1] + self._file.write(orjson.dumps(row, default=str)))

    def finish(self, places: "np.typing.NDArray[np.int64]") -> None:
        self._file.flush()
        self._places = places

    def read(self, place: int) -> tuple[Any, str]:
        number = int(np.searchsorted(self._places, place))
        start, stop = self._ends[number], self._ends[number + 1]
        prompt, answer = orjson.loads(os.pread(self._file.fileno(), stop - start, start))
        return prompt, answer


def _contents(batch: pa.RecordBatch) -> list[Any]:
    """The rows of a batch; None for one whose text is not UTF-8."""
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_content_of_one(batch.slice(row, 1)) for row in range(len(batch))]
    return rows


def _content_of_one(batch: pa.RecordBatch) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _without_nulls(value: Any) -> Any:
    """Messages without the keys that only other rows have: a table has all of them everywhere, as nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _column_names(fields: Any, prefix: str = "") -> Iterator[str]:
    for field in fields:
        yield prefix + field.name
        if pa.types.is_struct(field.type):
            yield from _column_names(field.type, f"{prefix}{field.name}.")
