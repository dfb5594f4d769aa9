"""A checkpoint that asks to run code is refused, and the code does not run."""

import dataclasses
import io
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, Metadata

from megatron_fipo.platform.checkpoint_reader import CheckpointReader, read_index
from megatron_fipo.runtime.errors import BreakdownError, CheckpointError


class Exploit:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    dcp.save({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    index = read_index(folder)
    tensors = {"a": torch.empty(6), "b": torch.empty(2, 3)}
    planner, reader = DefaultLoadPlanner(), CheckpointReader(folder, index)
    planner.set_up_planner(tensors, index, is_coordinator=True)
    reader.set_up_storage_reader(index, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return tensors


def change(folder: Path, **fields: Any) -> None:
    index = dataclasses.replace(read_index(folder), **fields)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_a_checkpoint_is_read(folder: Path) -> None:
    found = read(folder)
    assert torch.equal(found["a"], torch.arange(6.0)) and torch.equal(found["b"], torch.ones(2, 3))


def test_pytorchs_own_reader_would_run_the_index(folder: Path, tmp_path: Path) -> None:
    change(folder, planner_data=Exploit(tmp_path / "made"))
    FileSystemReader(folder).read_metadata()
    assert (tmp_path / "made").exists(), "else the refusals below are of something harmless"


@pytest.mark.parametrize("field", ["planner_data", "storage_data", "storage_meta", "version", "state_dict_metadata"])
def test_an_index_that_asks_for_code_is_refused(folder: Path, tmp_path: Path, field: str) -> None:
    change(folder, **{field: {"a": Exploit(tmp_path / "made")}})
    with pytest.raises(
        CheckpointError, match=r"/\.metadata asks for posix.mkdir, which no index of a checkpoint needs"
    ):
        read_index(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "asked",
    ["builtins eval", "torch load", "torch.distributed.checkpoint.metadata os.system", "torch.serialization load"],
)
def test_nothing_else_of_the_same_modules_can_be_had(folder: Path, asked: str) -> None:
    module, name = asked.split()
    (folder / ".metadata").write_bytes(b"\x80\x04" + f"c{module}\n{name}\n".encode() + b".")
    with pytest.raises(CheckpointError, match=f"asks for {module}.{name}"):
        read_index(folder)


def put_in_the_place_of_a(folder: Path, content: bytes) -> Path:
    """The file that holds tensor "a", whose archive is now this."""
    index = read_index(folder)
    for place, stored in index.storage_data.items():
        if place.fqn == "a":
            path = folder / stored.relative_path
            index.storage_data[place] = dataclasses.replace(stored, offset=0, length=len(content))
    path.write_bytes(content.ljust(path.stat().st_size + 10_000))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return path


def archive(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def problems_of_reading(folder: Path) -> list[str]:
    """What each way of reading says of tensor "a"."""
    told = []
    for way in (read, lambda folder: CheckpointReader(folder, read_index(folder)).read_tensor("a")):
        with pytest.raises(CheckpointError) as caught:
            way(folder)
        told.append(str(caught.value))
    return told


def test_a_tensor_that_asks_for_code_is_refused_in_words_that_do_not_invite_to_run_it(
    folder: Path, tmp_path: Path
) -> None:
    for evil, asked in ((Exploit(tmp_path / "made"), "posix.mkdir"), (Fraction(1, 2), "fractions.Fraction")):
        path = put_in_the_place_of_a(folder, archive({"a": evil}))
        assert problems_of_reading(folder) == 2 * [
            f"{path} holds a tensor that cannot be read (it asks for {asked}, which would have to be run); nothing in "
            "it was run"
        ]
    assert not (tmp_path / "made").exists()


def test_what_is_no_tensor_is_told(folder: Path) -> None:
    path = put_in_the_place_of_a(folder, b"other bytes" * 100)
    assert problems_of_reading(folder) == 2 * [
        f"{path} holds a tensor that cannot be read (it is something else than a tensor); nothing in it was run"
    ]


@pytest.mark.parametrize("zipped", [True, False])
def test_half_a_tensor_is_told(folder: Path, zipped: bool) -> None:
    content = archive(torch.arange(6.0), _use_new_zipfile_serialization=zipped)
    for length in range(0, len(content) - 8, 8):
        path = put_in_the_place_of_a(folder, content[:length])
        for told in problems_of_reading(folder):
            assert told.startswith(f"{path} holds a tensor that cannot be read (") and "\n" not in told


def test_objects_beside_tensors_are_refused(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"object": {"a": 1}}
    dcp.save(objects, storage_writer=FileSystemWriter(tmp_path / "other"), no_dist=True)
    with pytest.raises(CheckpointError, match="asks for .*BytesStorageMetadata|object is no tensor"):
        read_index(tmp_path / "other")


def test_files_outside_of_the_folder_are_refused(folder: Path) -> None:
    index = read_index(folder)
    stored = {place: dataclasses.replace(each, relative_path="../secret") for place, each in index.storage_data.items()}
    change(folder, storage_data=stored)
    with pytest.raises(CheckpointError, match="lies in no file of this folder"):
        read_index(folder)


def test_truncated_files_are_told(folder: Path) -> None:
    (path,) = folder.glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"lies outside of {path.name}, which may be truncated"):
        read_index(folder)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04", pickle.dumps(3), pickle.dumps(Metadata({}))[:-3]])
def test_what_is_no_index_is_told(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"/\.metadata cannot be read as a checkpoint's index"):
        read_index(folder)


def test_a_missing_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/\.metadata: is missing"):
        read_index(tmp_path)


def test_a_disk_that_refuses_is_no_damage(folder: Path) -> None:
    reader = CheckpointReader(folder, read_index(folder))
    for path in folder.glob("*.distcp"):
        path.unlink()
        # Opened, but not read.
        path.symlink_to("/proc/self/mem")
    with pytest.raises(BreakdownError, match=r"cannot be read \(Input/output error\), so nobody knows"):
        reader.read_tensor("a")
