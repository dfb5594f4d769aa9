"""One pass over a range of a JSONL file; `main` is the program of a worker of `data.jsonl`.

A worker is a process of its own, not a fork, because the trainer has threads. This module imports no ML library, so
that a worker starts at once.
"""

import json
import pickle
import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_fipo.data.content_key import content_key
from megatron_fipo.data.problem import Messages, UnusableRow
from megatron_fipo.data.row_index import RowScan
from megatron_fipo.data.schema import Schema, WrittenNumber

_BUFFER_BYTES = 2**20


@dataclass(slots=True)
class JsonlScan:
    """The lines that start within a range of the file.

    Attributes:
        offsets: Byte at which each line starts.
        rows: The verdicts on them.
    """

    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    rows: RowScan = field(default_factory=RowScan)


def scan_jsonl(path: Path, start: int, stop: int, schema: Schema) -> JsonlScan:
    """Judge every line that starts in the bytes [start, stop)."""
    scan = JsonlScan()
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        position = start
        if start:
            # A line belongs to the range that its first byte lies in.
            file.seek(start - 1)
            position += len(file.readline()) - 1
        for line in file:
            if position >= stop:
                break
            scan.offsets.append(position)
            position += len(line)
            _judge(line, schema, scan.rows)
    return scan


def _judge(line: bytes, schema: Schema, rows: RowScan) -> None:
    try:
        try:
            prompt, _ = schema.find(orjson.loads(line))
        except orjson.JSONDecodeError:
            # The exact reader takes what orjson does not, such as an odd half of a character, and says what is wrong.
            if not line.strip():
                rows.add_blank()
                return
            prompt, _ = find_in_line(line, schema)
        rows.add_usable(content_key(prompt))
    except UnusableRow as error:
        rows.add_unusable(error.reason, error.detail)


def find_in_line(line: bytes, schema: Schema) -> tuple[str | Messages, str]:
    """Prompt and reference answer of a line, numbers as they are written.

    Raises:
        UnusableRow: The line is not a JSON object in UTF-8, or prompt or answer cannot be used.
    """
    return schema.find(parse_line(line))


def parse_line(line: bytes) -> Any:
    """The JSON value of a line, with a `WrittenNumber` for each number.

    Raises:
        UnusableRow: The line is not JSON in UTF-8.
    """
    try:
        # The mark that some editors put in front of a file is no part of the first line.
        text = line.decode("utf-8-sig")
        return json.loads(text, parse_int=WrittenNumber, parse_float=WrittenNumber, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise UnusableRow("broken", f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UnusableRow("broken", f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UnusableRow("broken", "JSON nested too deep") from None


def _refuse(word: str) -> None:
    raise UnusableRow("broken", f"not JSON: {word} is no number")


def main() -> None:
    """Read path, start, stop and schema from standard input, pickle the `JsonlScan` to standard output."""
    request = json.load(sys.stdin)
    scan = scan_jsonl(Path(request["path"]), request["start"], request["stop"], Schema(**request["schema"]))
    pickle.dump(scan, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
