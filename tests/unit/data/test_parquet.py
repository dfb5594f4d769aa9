"""Rows of Parquet files: schemas, damaged files, and the copy that they are read from."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import ParquetPrompts
from megatron_fipo.data import parquet
from megatron_fipo.data.parquet import ParquetRows
from megatron_fipo.data.schema import DAPO, GSM8K
from tests.unit.data.prompt_files import numbered, write_parquet


def read_all(path: Path, **values) -> tuple[ParquetRows, list]:
    rows = ParquetRows(ParquetPrompts(path=path, **values), "data.train")
    return rows, [rows.read(place) for place in rows.index.usable]


def refusal(path: Path, **values) -> str:
    with pytest.raises(ConfigError) as caught:
        ParquetRows(ParquetPrompts(path=path, **values), "data.train.1")
    return str(caught.value)


def dapo_row(number: int) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"problem {number}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(number), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": str(number)},
    }


def test_the_schema_of_dapo_math(tmp_path: Path):
    rows, problems = read_all(write_parquet(tmp_path / "dapo.parquet", [dapo_row(number) for number in range(3)]))
    assert rows.schema == DAPO
    assert [problem.prompt for problem in problems] == [dapo_row(number)["prompt"] for number in range(3)]
    assert [problem.answer for problem in problems] == ["0", "1", "2"]
    assert rows.columns == (
        *("data_source", "prompt", "ability", "reward_model", "reward_model.ground_truth", "reward_model.style"),
        *("extra_info", "extra_info.index"),
    )


def test_the_schema_of_gsm8k(tmp_path: Path):
    path = write_parquet(tmp_path / "gsm8k.parquet", [{"question": "q", "answer": "so\n#### 1,000"}])
    rows, (problem,) = read_all(path)
    assert (rows.schema, problem.prompt, problem.answer) == (GSM8K, "q", "1000")


def test_columns_by_name(tmp_path: Path):
    path = write_parquet(tmp_path / "own.parquet", [{"task": {"text": "t", "gold": 5}, "answer": "wrong one"}])
    _, (problem,) = read_all(path, prompt_field="task.text", answer_field="task.gold")
    assert (problem.prompt, problem.answer) == ("t", "5")


def test_rows_are_numbered_over_row_groups_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "_ROWS_PER_BATCH", 3)
    contents = numbered(20)
    contents[4]["answer"] = None
    contents[11]["prompt"] = " "
    path = write_parquet(tmp_path / "many.parquet", contents, row_group_size=7)
    rows, problems = read_all(path)
    assert [problem.answer for problem in problems] == [str(n) for n in range(20) if n not in (4, 11)]
    assert {reason: each.first_rows for reason, each in rows.index.skipped.items()} == {"no_answer": [4], "empty": [11]}
    # In any order, and again.
    assert [rows.read(place).answer for place in (19, 0, 12, 0)] == ["19", "0", "12", "0"]


def test_rows_that_are_skipped_before_the_first_read_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "_ROWS_PER_BATCH", 4)
    rows = ParquetRows(ParquetPrompts(path=write_parquet(tmp_path / "x.parquet", numbered(12))), "data.train")
    rows.index.skip(rows.index.usable[6:], "duplicate", "the prompt of x:0")
    read = []
    monkeypatch.setattr(
        parquet, "_contents", lambda batch, real=parquet._contents: read.append(len(batch)) or real(batch)
    )
    assert [rows.read(place).answer for place in range(6)] == ["0", "1", "2", "3", "4", "5"]
    assert read == [4, 2]


def test_nulls_of_other_rows_are_no_keys_of_a_message(tmp_path: Path):
    turns = [{"role": "user", "content": "a", "tool": "t"}], [{"role": "user", "content": "b", "tool": None}]
    path = write_parquet(tmp_path / "tools.parquet", [{"prompt": turn, "answer": "x"} for turn in turns])
    _, problems = read_all(path)
    assert [problem.prompt for problem in problems] == [turns[0], [{"role": "user", "content": "b"}]]


def test_text_that_is_not_utf8(tmp_path: Path):
    text = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    path = tmp_path / "bytes.parquet"
    pq.write_table(pa.table({"prompt": text, "answer": ["a", "b", "c"]}), path)
    rows, problems = read_all(path)
    assert [problem.prompt for problem in problems] == ["good", "fine"]
    assert rows.index.skipped["broken"].first_rows == [1]


@pytest.mark.parametrize("damage", ["half", "empty", "text", "pages"])
def test_a_damaged_file(tmp_path: Path, damage: str):
    path = write_parquet(tmp_path / "damaged.parquet", numbered(2000), compression="none")
    content = path.read_bytes()
    damaged = {
        "half": content[: len(content) // 2],
        "empty": b"",
        "text": b'{"prompt": "a", "answer": "b"}\n' * 9,
        "pages": content[:4] + b"\xff" * 2000 + content[2004:],
    }
    path.write_bytes(damaged[damage])
    message = refusal(path)
    assert message.startswith(f"data.train.1.path = {path}: must be a Parquet file that can be read")
    assert "fetch the file again" in message


def test_a_file_that_is_not_there(tmp_path: Path):
    assert "No such file" in refusal(tmp_path / "absent.parquet")


def test_a_column_that_is_not_there(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", [{"problem": "p", "meta": {"gold": "1"}}])
    assert refusal(path) == (
        f"data.train.1.prompt_field = prompt: is not among the columns of {path}: problem, meta, meta.gold; "
        "name one of them"
    )
    assert refusal(path, prompt_field="problem", answer_field="meta.golden").startswith(
        "data.train.1.answer_field = meta.golden: is not among the columns"
    )


def test_wrong_types(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", [{"prompt": 5, "answer": "a"}, {"prompt": 6, "answer": "b"}])
    rows, problems = read_all(path)
    assert not problems
    assert rows.index.skipped["broken"].describe("broken") == (
        '2 broken rows (0, 1), the first with "prompt" is neither text nor a list of messages'
    )
