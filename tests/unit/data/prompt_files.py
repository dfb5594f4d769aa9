"""Prompt files and streams of a few rows, for the tests of the data room."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_fipo.config.data import DataConfig, JsonlPrompts, PromptSource
from megatron_fipo.data.stream import PromptStream
from tests.tiny_models import byte_tokenizer


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows are objects, or lines as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def numbered(count: int, first: int = 0, text: str = "problem") -> list[dict[str, str]]:
    return [{"prompt": f"{text} {number}", "answer": str(number)} for number in range(first, first + count)]


def jsonl_source(folder: Path, stem: str, rows: list[Any], **values: Any) -> JsonlPrompts:
    return JsonlPrompts(path=write_jsonl(folder / f"{stem}.jsonl", rows), **values)


def data_config(*sources: PromptSource, **values: Any) -> DataConfig:
    return DataConfig(train=sources, **{"prompt_format": "raw", **values})


def open_stream(*sources: PromptSource, seed: int = 1, **values: Any) -> PromptStream:
    return PromptStream(data_config(*sources, **values), byte_tokenizer(), seed)
