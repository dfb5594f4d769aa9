"""Rows of a JSONL file: found in one pass, read when they are drawn."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import JsonlPrompts
from megatron_fipo.data.content_key import content_key
from megatron_fipo.data.problem import Problem, UnusableRow
from megatron_fipo.data.row_index import RowIndex
from megatron_fipo.data.scan_jsonl import JsonlScan, find_in_line, parse_line, scan_jsonl
from megatron_fipo.data.schema import Schema, choose_schema
from megatron_fipo.runtime.child_process import child_environment
from megatron_fipo.runtime.errors import RunError

_ROWS_TO_RECOGNISE = 100
_BYTES_PER_WORKER = 2**24
_MOST_WORKERS = 8
# Not -m: what the worker sends back must not belong to a module called __main__.
_PROGRAM = "from megatron_fipo.data.scan_jsonl import main; main()"


class JsonlRows:
    """The lines of a file, one JSON object each; line numbers start at 1, blank lines are no rows.

    In memory are 25 bytes a line. A line is read from the file, which stays open, when it is asked for.

    Args:
        source: File and columns.
        field: Where the source lies in the configuration, such as data.train.

    Attributes:
        index: The verdict on every line.
        schema: Where prompt and answer stand.
        description: How the rows are read, for the log.
        columns: Names of the columns in the first rows.
        digest: SHA-256 of the file.

    Raises:
        ConfigError: The file cannot be opened.
    """

    def __init__(self, source: JsonlPrompts, field: str) -> None:
        try:
            # Unbuffered: lines are read by position.
            self._file = source.path.open("rb", buffering=0)
        except OSError as error:
            raise ConfigError(
                field=f"{field}.path",
                value=source.path,
                rule=f"must be a readable file ({error.strerror})",
                way_out="correct the path",
            ) from error
        self._path = source.path
        first_rows = _first_rows(source.path)
        self.schema = choose_schema(source, first_rows)
        self.description = f"read as {self.schema.name}"
        columns = dict.fromkeys(key for row in first_rows if isinstance(row, dict) for key in row)
        self.columns: tuple[str, ...] = tuple(columns)
        size = os.fstat(self._file.fileno()).st_size
        scan, self.digest = _scan(source.path, size, self.schema)
        self._offsets = np.append(np.frombuffer(scan.offsets, dtype=np.int64), size)
        self.index = RowIndex(scan.rows, first_number=1)

    def read(self, place: int) -> Problem:
        """Read the line at a place, from 0.

        Raises:
            RunError: The line is no longer what it was when it was indexed.
        """
        start, stop = int(self._offsets[place]), int(self._offsets[place + 1])
        try:
            prompt, answer = find_in_line(os.pread(self._file.fileno(), stop - start, start), self.schema)
            same = content_key(prompt) == self.index.keys[place].tobytes()
        except UnusableRow:
            same = False
        if not same:
            raise RunError(
                f"{self._path}: line {place + 1} is not what it was when the run began; restore the file, and never "
                "write to it while a run reads it"
            )
        return Problem(prompt=prompt, answer=answer)


def _first_rows(path: Path) -> list[Any]:
    """The first rows that are JSON, to recognise the columns by."""
    rows = []
    with path.open("rb") as file:
        for line in itertools.islice(file, _ROWS_TO_RECOGNISE):
            try:
                rows.append(parse_line(line))
            except UnusableRow:
                continue
    return rows


def _scan(path: Path, size: int, schema: Schema) -> tuple[JsonlScan, str]:
    """Scan and digest the whole file; large files with a process for each core."""
    num_workers = min(len(os.sched_getaffinity(0)), size // _BYTES_PER_WORKER, _MOST_WORKERS)
    if num_workers < 2:
        return scan_jsonl(path, 0, size, schema), _digest(path)
    bounds = [size * worker // num_workers for worker in range(num_workers + 1)]
    workers = [_start_worker(path, start, stop, schema) for start, stop in itertools.pairwise(bounds)]
    try:
        digest = _digest(path)
        scans = [_result_of(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    for scan in scans[1:]:
        scans[0].offsets.extend(scan.offsets)
        scans[0].rows.extend(scan.rows)
    return scans[0], digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start_worker(path: Path, start: int, stop: int, schema: Schema) -> subprocess.Popen[bytes]:
    request = {"path": str(path), "start": start, "stop": stop, "schema": dataclasses.asdict(schema)}
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(),
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(request).encode())
    worker.stdin.close()
    worker.stdin = None
    return worker


def _result_of(worker: subprocess.Popen[bytes]) -> JsonlScan:
    output, errors = worker.communicate()
    if worker.returncode != 0:
        last_words = errors.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"scan_jsonl ended with exit status {worker.returncode}:\n{last_words}")
    scan: JsonlScan = pickle.loads(output)
    return scan
