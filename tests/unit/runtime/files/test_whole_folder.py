"""A folder that is there whole or not at all."""

from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.runtime.files.whole_folder import WholeFolder


def test_it_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    folder = WholeFolder(tmp_path / "above" / "out", "OUT")
    folder.begin(100)
    (folder.partial / "deep").mkdir()
    (folder.partial / "deep" / "file").write_text("content")
    assert not folder.target.exists()
    folder.commit()
    assert (folder.target / "deep" / "file").read_text() == "content"
    assert not folder.partial.exists()


def test_what_an_attempt_left_is_removed(tmp_path: Path) -> None:
    folder = WholeFolder(tmp_path / "out", "OUT")
    folder.begin(0)
    (folder.partial / "old").touch()
    folder.begin(0)
    assert list(folder.partial.iterdir()) == []
    folder.abandon()
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"OUT = .*out: needs 931322574.62 GiB, and .* are free there; free some"):
        WholeFolder(tmp_path / "out", "OUT").begin(10**18)
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    folder, other = (WholeFolder(tmp_path / "out", "OUT") for _ in range(2))
    folder.begin(0)
    (folder.partial / "file").touch()
    with pytest.raises(ConfigError, match=r"OUT = .*out: is being written by another process, into .*\.out\.partial"):
        other.begin(0)
    folder.commit()
    assert (folder.target / "file").exists()


@pytest.mark.parametrize("place", ["", ".", "..", "/", "deep/.."])
def test_a_place_that_dots_name_is_told_by_its_own_name(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    before = list(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        WholeFolder(Path(place), "OUT").begin(0)
    assert str(caught.value) == (
        f"OUT = {Path(place).resolve()}: must be a new or empty folder, and it is not; choose another folder or remove "
        "this one"
    )
    assert list(tmp_path.rglob("*")) == before
