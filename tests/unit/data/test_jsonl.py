"""The one pass over a JSONL file, alone and cut among workers, and its price."""

import os
import resource
from pathlib import Path

import pytest

from megatron_fipo.config.data import JsonlPrompts
from megatron_fipo.data import jsonl
from megatron_fipo.data.jsonl import JsonlRows
from megatron_fipo.data.scan_jsonl import scan_jsonl
from megatron_fipo.data.schema import SIMPLE
from megatron_fipo.runtime.errors import RunError
from tests.unit.data.prompt_files import numbered, write_jsonl

ROWS = [
    *numbered(3),
    b"",
    b"{broken",
    {"prompt": "\u00e9" * 5, "answer": 1.5},
    {"prompt": "no answer"},
    b"  ",
    {"prompt": "problem 1", "answer": "again"},
    b'{"prompt": "\xff", "answer": "a"}',
    {"prompt": "last", "answer": "a"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def test_any_cut_of_the_file_gives_the_same_scan(path: Path):
    size = path.stat().st_size
    whole = scan_jsonl(path, 0, size, SIMPLE)
    assert len(whole.offsets) == len(ROWS)
    for cut in range(size + 1):
        first, second = scan_jsonl(path, 0, cut, SIMPLE), scan_jsonl(path, cut, size, SIMPLE)
        first.offsets.extend(second.offsets)
        first.rows.extend(second.rows)
        assert first == whole, cut


def test_workers_find_what_one_process_finds(path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = JsonlRows(JsonlPrompts(path=path), "data.train")
    monkeypatch.setattr(jsonl, "_BYTES_PER_WORKER", 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    together = JsonlRows(JsonlPrompts(path=path), "data.train")
    assert together.index.usable.tolist() == alone.index.usable.tolist() == [0, 1, 2, 5, 8, 10]
    assert together.index.skipped == alone.index.skipped
    assert (together.index.keys == alone.index.keys).all()
    assert together.digest == alone.digest
    assert [together.read(place).answer for place in together.index.usable] == ["0", "1", "2", "1.5", "again", "a"]


def test_rows_and_verdicts(path: Path):
    index = JsonlRows(JsonlPrompts(path=path), "data.train").index
    assert index.num_rows == 9
    assert {reason: rows.first_rows for reason, rows in index.skipped.items()} == {"broken": [5, 10], "no_answer": [7]}


def test_a_line_without_its_end_is_broken(tmp_path: Path):
    path = tmp_path / "cut.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "c", "ans')
    rows = JsonlRows(JsonlPrompts(path=path), "data.train")
    assert rows.index.usable.tolist() == [0]
    assert rows.index.skipped["broken"].first_rows == [2]


@pytest.mark.parametrize("change", ["rewritten", "cut"])
def test_a_file_that_changes_while_it_is_read(path: Path, change: str):
    rows = JsonlRows(JsonlPrompts(path=path), "data.train")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"problem 2", b"problem 7") if change == "rewritten" else content[:60])
    assert rows.read(0).prompt == "problem 0"
    with pytest.raises(RunError, match=r"rows.jsonl: line 3 is not what it was when the run began; restore the file"):
        rows.read(2)


def test_a_file_that_is_replaced_is_still_the_old_one(path: Path, tmp_path: Path):
    rows = JsonlRows(JsonlPrompts(path=path), "data.train")
    os.replace(write_jsonl(tmp_path / "new.jsonl", numbered(2, text="other")), path)
    assert rows.read(10).prompt == "last"


def test_a_scan_that_breaks_down_is_told(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jsonl, "_BYTES_PER_WORKER", 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(jsonl, "_PROGRAM", "raise SystemExit('no room')")
    with pytest.raises(RuntimeError, match="scan_jsonl ended with exit status 1:\nno room"):
        JsonlRows(JsonlPrompts(path=path), "data.train")


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def test_the_price_of_200_000_rows(tmp_path: Path):
    """A fifth of what a million rows may cost: 5 s on 2 cores, counted as processor time, and 300 MiB."""
    path = tmp_path / "large.jsonl"
    filler = "the rest of a problem, as long as problems are; " * 5
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "Problem {n}: {filler}", "answer": "{n}"}}\n' for n in range(200_000))
    assert path.stat().st_size > 200_000 * 270
    Path("/proc/self/clear_refs").write_text("5")
    memory, seconds = memory_mib("VmRSS"), cpu_seconds()
    rows = JsonlRows(JsonlPrompts(path=path), "data.train")
    seconds, memory = cpu_seconds() - seconds, memory_mib("VmHWM") - memory
    assert len(rows.index.usable) == 200_000
    assert rows.read(199_999).answer == "199999"
    assert seconds < 2.0
    assert memory < 60
