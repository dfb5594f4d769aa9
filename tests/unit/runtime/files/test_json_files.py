import json
import math
from pathlib import Path

from megatron_fipo.runtime.files.json_files import append_lines, read_whole_lines, write_json


def test_lines_come_back_with_the_ends_of_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_lines(path, [{"a": "\u00bd"}])
    append_lines(path, [{"a": [math.nan, 1.5]}, {}])
    objects, ends = read_whole_lines(path)
    assert objects == [{"a": "\u00bd"}, {"a": [None, 1.5]}, {}]
    content = path.read_bytes()
    assert [content[:end].count(b"\n") for end in ends] == [1, 2, 3]
    assert ends[-1] == len(content)


def test_reading_ends_at_the_first_line_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for rest in (b'{"b": 1', b'{"b": 1}', b"\x00\x00\x00\n", b"3\n", b'{"b": 1\n{"c": 2}\n'):
        path.write_bytes(b'{"a": 1}\n' + rest)
        assert read_whole_lines(path) == ([{"a": 1}], [9])


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": math.inf})
    write_json(path, {"b": "\ud83d"})
    assert json.loads(path.read_text()) == {"b": "\ud83d"}
    assert list(tmp_path.iterdir()) == [path]
