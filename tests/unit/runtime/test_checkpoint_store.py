"""Checkpoints are complete or absent, and what is wrong with one is said."""

import errno
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_fipo.runtime import checkpoint_store
from megatron_fipo.runtime.checkpoint_store import Checkpoint, CheckpointStore, NewerFormatError
from megatron_fipo.runtime.errors import BreakdownError, CheckpointError
from megatron_fipo.runtime.files.hashed_file import hash_file
from megatron_fipo.runtime.retention import Retention

LAYOUT = {"world": 2, "tensor": 2}
ALL = Retention(keep_last=100)


def write(store: CheckpointStore, step: int, score: float | None = None) -> Checkpoint:
    partial = store.begin(step, 100)
    (partial / "actor").mkdir()
    (partial / "actor" / "weights").write_bytes(b"weights of step %d" % step)
    (partial / "trainer.json").write_text(json.dumps({"step": step}))
    written = {"actor/weights": hash_file(partial / "actor" / "weights")}
    return store.commit(step, LAYOUT, written, score)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.newest_valid() is None and store.steps() == []
    committed = write(store, 5, score=0.25)
    assert store.newest_valid() == committed == store.read(5, check_hashes=True)
    assert committed.path == tmp_path / "checkpoints" / "step_5"
    manifest = committed.manifest
    assert (manifest.step, manifest.score, manifest.layout) == (5, 0.25, LAYOUT)
    assert manifest.files.keys() == {"actor/weights", "trainer.json"}
    assert manifest.versions.keys() == {"megatron-fipo", "torch", "megatron-core"}
    assert os.listdir(store.folder) == ["step_5"]
    write(store, 5, score=float("nan"))
    assert store.read(5).manifest.score is None, "written again in its place"


def test_steps_are_numbers_not_names(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALL)
    for step in (9, 10, 2):
        write(store, step)
    (tmp_path / "step_007").mkdir()
    (tmp_path / "notes").mkdir()
    assert store.steps() == [2, 9, 10]
    found = store.newest_valid()
    assert found is not None and found.manifest.step == 10


def truncate(path: Path) -> None:
    (path / "actor" / "weights").write_bytes(b"weights")


def flip(path: Path) -> None:
    content = bytearray((path / "actor" / "weights").read_bytes())
    content[3] ^= 1
    (path / "actor" / "weights").write_bytes(content)


def lose(path: Path) -> None:
    (path / "trainer.json").unlink()


def add(path: Path) -> None:
    (path / "common.pt").write_bytes(b"")


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])


def alter_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"world": 2', '"world": 4'))


def be_a_list(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "actor/weights: has 7 bytes where 17 were written"),
        (flip, r"actor/weights: other bytes than were written \(SHA-256 differs\)"),
        (lose, "trainer.json: is missing"),
        (add, "common.pt: is in no manifest"),
        (lose_manifest, "manifest.json: is missing; the folder is no checkpoint"),
        (cut_manifest, "manifest.json: cannot be read"),
        (alter_manifest, "manifest.json: cannot be read .its own SHA-256 differs"),
        (be_a_list, "manifest.json: cannot be read"),
    ],
)
def test_damage_is_named_and_the_one_before_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    store = CheckpointStore(tmp_path, ALL)
    write(store, 1)
    write(store, 2)
    damage(tmp_path / "step_2")
    with pytest.raises(CheckpointError, match=said):
        store.read(2, check_hashes=True)
    with caplog.at_level(logging.WARNING):
        found = store.newest_valid()
    assert found is not None and found.manifest.step == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("checkpoint of step 2 is damaged and left out: ")
    damage(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole; bring back a copy, or begin anew"):
        store.newest_valid()


def test_what_cannot_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, ALL)
    write(store, 1)
    write(store, 2)

    def refuse(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BreakdownError, match=r"step_2/manifest.json: cannot be read \(Input/output error\), so nobody"):
        store.newest_valid()


def test_something_else_in_its_place_is_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALL)
    write(store, 1)
    write(store, 2)
    manifest = tmp_path / "step_2" / "manifest.json"
    manifest.rename(tmp_path / "kept")
    manifest.mkdir()
    newest = store.newest_valid()
    assert newest is not None and newest.manifest.step == 1


def test_sizes_alone_are_checked_on_request(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    flip(tmp_path / "step_1")
    assert store.newest_valid(check_hashes=False) is not None
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        store.newest_valid()


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    store.path(1).rename(store.path(8))
    with pytest.raises(CheckpointError, match="is of step 1; the folder was renamed"):
        store.read(8)


def test_a_later_format_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, ALL)
    write(store, 1)
    monkeypatch.setattr(checkpoint_store, "FORMAT_VERSION", 2)
    write(store, 2)
    monkeypatch.undo()
    with pytest.raises(
        NewerFormatError, match="format version 2, and this release reads 1; use the release that wrote"
    ):
        store.newest_valid()


def test_what_killed_saves_and_removals_left_is_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    (store.begin(2, 100) / "actor").mkdir()
    (tmp_path / ".step_0.removed").mkdir()
    (tmp_path / ".others").mkdir()
    assert store.steps() == [1], "what is not complete is no checkpoint"
    assert store.clean() == [".step_0.removed", ".step_2.partial"]
    assert sorted(os.listdir(tmp_path)) == [".others", "step_1"]
    assert store.clean() == []


def test_a_save_that_failed_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(2, 100) / "half").write_bytes(b"1")
    store.abandon(2)
    assert os.listdir(tmp_path) == []
    partial = store.begin(2, 100)
    (partial / "half").write_bytes(b"1")
    assert os.listdir(store.begin(2, 100)) == [], "begun again"


@pytest.mark.parametrize("moment", ["write_json", "wait_for_disk", "hash_file"])
def test_dying_before_the_end_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)

    def die(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_store, moment, die)
    with pytest.raises(KeyboardInterrupt):
        partial = store.begin(2, 100)
        (partial / "trainer.json").write_text("{}")
        store.commit(2, LAYOUT, {})
    monkeypatch.undo()
    assert store.steps() == [1]
    found = store.newest_valid()
    assert found is not None and found.manifest.step == 1


def test_files_that_another_node_keeps_to_itself_are_missed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    partial = store.begin(1, 100)
    (partial / "a").write_bytes(b"1")
    written = {"a": hash_file(partial / "a"), "b": hash_file(partial / "a")}
    with pytest.raises(CheckpointError, match="b: was written by another rank and is not to be seen here"):
        store.commit(1, LAYOUT, written)


def test_those_that_need_not_stay_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, Retention(keep_last=2, keep_every=4, keep_best=1))
    for step, score in enumerate((0.1, 0.9, 0.2, 0.3, None, 0.4, 0.5), start=1):
        write(store, step, score)
    assert store.steps() == [2, 4, 6, 7]
    assert sorted(os.listdir(tmp_path)) == ["step_2", "step_4", "step_6", "step_7"]
    truncate(tmp_path / "step_7")
    with caplog.at_level(logging.WARNING):
        write(store, 8)
    assert store.steps() == [2, 4, 6, 7, 8], "a damaged one neither counts nor goes"
    assert f"checkpoint of step 7 is left where it is: {tmp_path}/step_7/" in caplog.text


def test_scores_of_different_metrics_are_not_compared(tmp_path: Path) -> None:
    loss, accuracy = (
        CheckpointStore(tmp_path, Retention(keep_last=1, keep_best=1, best_metric=metric))
        for metric in ("train/loss", "eval/accuracy")
    )
    write(loss, 1, score=7.0)
    write(accuracy, 2, score=0.5)
    write(accuracy, 3, score=0.25)
    assert accuracy.steps() == [2, 3]
    assert (accuracy.read(2).manifest.metric, write(accuracy, 4).manifest.metric) == ("eval/accuracy", None)


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALL)
    for step in (1, 2, 3):
        write(store, step)
    assert store.set_aside_after(1) == ["step_2.set_aside", "step_3.set_aside"]
    write(store, 2)
    assert store.set_aside_after(1) == ["step_2.set_aside"], "in place of the one before"
    assert store.set_aside_after(1) == [] and store.steps() == [1] and store.clean() == []


def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", free_bytes=lambda path: 3 * 1024**3)
    with pytest.raises(CheckpointError, match=r"3.00 GiB are free and a checkpoint needs 4.08 GiB; free some space"):
        store.begin(1, 4 * 1024**3)
    assert os.listdir(tmp_path / "checkpoints") == []
    store.begin(1, 2 * 1024**3)
    with pytest.raises(CheckpointError, match=r": 1 MiB are free and a checkpoint needs 6 MiB; free some space"):
        CheckpointStore(tmp_path, free_bytes=lambda path: 1024**2).begin(1, 6 * 1024**2)


@contextmanager
def as_a_user() -> Iterator[None]:
    """Not as root, who may write everywhere."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_to_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = CheckpointStore(folder / "checkpoints")
        write(store, 1)
        store.begin(2, 100)
        for place in (folder, store.folder):
            place.chmod(0o555)
        with as_a_user():
            with pytest.raises(CheckpointError, match=r"step_3.partial: cannot be made .Permission denied.; mend its"):
                store.begin(3, 100)
            with pytest.raises(CheckpointError, match="cannot be cleaned of unfinished checkpoints .Permission"):
                store.clean()
            found = store.newest_valid()
        assert found is not None and found.manifest.step == 1
        store.folder.chmod(0o311)
        with (
            as_a_user(),
            pytest.raises(CheckpointError, match="cannot be cleaned of unfinished checkpoints .Permission"),
        ):
            store.clean()
        store.folder.chmod(0o755)


def test_a_checkpoint_with_a_folder_that_cannot_be_listed_is_not_damaged() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        store = CheckpointStore(folder / "checkpoints", ALL)
        write(store, 1)
        actor = write(store, 2).path / "actor"
        actor.chmod(0o000)
        with as_a_user(), pytest.raises(BreakdownError, match=r"step_2/actor: cannot be read .Permission denied"):
            store.newest_valid()
        actor.chmod(0o755)


def test_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoints: cannot be made"):
        CheckpointStore(tmp_path / "checkpoints").begin(1, 100)


def test_an_older_checkpoint_that_cannot_be_read_does_not_undo_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    manifest = tmp_path / "step_1" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    with caplog.at_level(logging.WARNING):
        write(store, 2)
    assert store.steps() == [1, 2]
    assert "checkpoint of step 1 is left where it is" in caplog.text
