import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.display.token_file import TokenFileError, load_tokens, save_tokens, token_path
from tests.unit.display.records import make_records


@pytest.mark.parametrize("pieces", [None, ("\x00", "é\n", "", "\ud800", "日本")])
def test_records_come_back_as_they_were(tmp_path: Path, pieces: tuple[str, ...] | None) -> None:
    records, path = make_records(pieces), token_path(tmp_path, 12)
    save_tokens(records, path)
    assert [each.name for each in (tmp_path / "tokens").iterdir()] == ["step_000012.npz"]
    loaded = load_tokens(path)
    for field in dataclasses.fields(records):
        mine, theirs = getattr(loaded, field.name), getattr(records, field.name)
        assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs, field.name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def changed(**arrays: Any) -> Any:
    def change(path: Path) -> None:
        with np.load(path) as file:
            content = {name: file[name] for name in file.files}
        content |= arrays
        np.savez(path, **{name: value for name, value in content.items() if value is not None})

    return change


DAMAGES = {
    "cut off": (cut, "cannot be read as token records"),
    "no archive": (lambda path: path.write_bytes(b"nothing"), "cannot be read as token records"),
    "an object array": (changed(entropy=np.array([None] * 5)), "cannot be read as token records"),
    "another version": (changed(format_version=np.int64(7)), "has another format than version 1"),
    "a missing array": (changed(entropy=None), "lacks entropy"),
    "another type": (changed(entropy=np.zeros(5)), "lacks entropy"),
    "text that is no JSON": (changed(pieces=np.zeros(3, dtype=np.uint8)), "lacks pieces"),
    "too few values": (changed(entropy=np.zeros(4, dtype=np.float32)), "do not fit together"),
    "starts that fall": (changed(starts=np.array([0, 9, 5])), "do not fit together"),
    "no starts": (changed(starts=np.zeros(0, dtype=np.int64)), "do not fit together"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGES[kind]
    path = token_path(tmp_path, 1)
    save_tokens(make_records(), path)
    damage(path)
    with pytest.raises(TokenFileError, match=message):
        load_tokens(path)
