"""What is refused before a model is built from a folder, and how a folder is written."""

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.hf_folder import (
    HfFolderWriter,
    check_weights,
    fingerprint_folder,
    model_config_for,
    read_model_config,
    read_tensors,
    save_tensors,
)

CONFIG = {"model_type": "qwen2", "vocab_size": 301}
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.zeros(0, 5),
}
SHAPES = {"a": [2, 3], "b": [4], "c": [0, 5]}
INDEX = "model.safetensors.index.json"


def write_single(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for number, names in enumerate(("a", "bc"), start=1):
        save_file({name: TENSORS[name] for name in names}, folder / f"model-{number}.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_a_whole_folder_passes(tmp_path, write):
    folder = write(tmp_path / "model")
    assert read_model_config(folder) == CONFIG
    assert check_weights(folder) == SHAPES


def cut_off(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def header_size(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def moved_out(folder: Path, name: str) -> None:
    (folder / "model-1.safetensors").rename(folder.parent / "model-1.safetensors")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("model-1.safetensors", name))


Damage = Callable[[Path], None]

BROKEN_CONFIGS: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "must be a Hugging Face model folder, and there is no such folder"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "must contain config.json, and it does not"),
    "config.json is not JSON": (
        lambda folder: (folder / "config.json").write_text('{\n"vocab_size": }'),
        "must contain a readable config.json, and it is not JSON (line 2: Expecting value)",
    ),
    "config.json is not text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        "must contain a readable config.json, and it is not text",
    ),
    "config.json is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "must contain a readable config.json, and it is no JSON object",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_broken_config_is_refused(tmp_path, case):
    damage, rule = BROKEN_CONFIGS[case]
    folder = write_single(tmp_path / "model")
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        read_model_config(folder)
    way_out = (
        "download or create the model there, or correct the path"
        if case == "no folder"
        else "fetch the model's files again"
    )
    assert str(caught.value) == f"model.path = {folder}: {rule}; {way_out}"


BROKEN_WEIGHTS: dict[str, tuple[Callable[[Path], Path], Damage, str]] = {
    "no weights": (
        write_single,
        lambda folder: (folder / "model.safetensors").unlink(),
        "must contain model.safetensors or model.safetensors.index.json, and it has neither",
    ),
    "a listed file is missing": (
        write_sharded,
        lambda folder: (folder / "model-2.safetensors").unlink(),
        "lacks the weight file model-2.safetensors that its index lists",
    ),
    "a file is empty": (
        write_sharded,
        lambda folder: cut_off(folder / "model-1.safetensors", 0),
        "has a cut-off weight file: model-1.safetensors ends inside its header",
    ),
    "a file ends in its header": (
        write_sharded,
        lambda folder: cut_off(folder / "model-1.safetensors", 20),
        "has a cut-off weight file: model-1.safetensors ends inside its header",
    ),
    "a file ends in its data": (
        write_single,
        lambda folder: cut_off(folder / "model.safetensors", header_size(folder / "model.safetensors") + 31),
        "has a cut-off weight file: model.safetensors is {size} of {needed} bytes",
    ),
    "a file is a pointer to a file": (
        write_single,
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "has a cut-off weight file: model.safetensors ends inside its header",
    ),
    "a file has no header": (
        write_single,
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops"),
        "has a damaged weight file: the header of model.safetensors is not JSON",
    ),
    "the index lists a tensor that no file has": (
        write_sharded,
        lambda folder: (folder / INDEX).write_text(
            json.dumps(
                {"weight_map": {"a": "model-1.safetensors", "x": "model-2.safetensors", "y": "model-1.safetensors"}}
            )
        ),
        "lacks 2 tensors that its index lists, x first",
    ),
    "the index is not JSON": (
        write_sharded,
        lambda folder: (folder / INDEX).write_text("{"),
        "has a damaged model.safetensors.index.json: it is no JSON object with a weight_map",
    ),
    "the index has no weight map": (
        write_sharded,
        lambda folder: (folder / INDEX).write_text("{}"),
        "has a damaged model.safetensors.index.json: it is no JSON object with a weight_map",
    ),
    "the index names no files": (
        write_sharded,
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": 1}})),
        "has a damaged model.safetensors.index.json: it is no JSON object with a weight_map",
    ),
    "the index leads out of the folder": (
        write_sharded,
        lambda folder: moved_out(folder, "../model-1.safetensors"),
        "has a model.safetensors.index.json that leads out of the folder, to ../model-1.safetensors",
    ),
    "the index leads to the root": (
        write_sharded,
        lambda folder: moved_out(folder, str(folder.parent / "model-1.safetensors")),
        "has a model.safetensors.index.json that leads out of the folder, to {outside}",
    ),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(tmp_path, case):
    write, damage, rule = BROKEN_WEIGHTS[case]
    folder = write(tmp_path / "model")
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    damage(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with pytest.raises(ConfigError) as caught:
        check_weights(folder)
    rule = rule.format(size=size, needed=whole, outside=tmp_path / "model-1.safetensors")
    assert str(caught.value) == f"model.path = {folder}: {rule}; fetch the model's weight files again"


def write_source(folder: Path) -> Path:
    write_single(folder)
    for name in ("tokenizer.json", "chat_template.jinja", "training_notes.txt"):
        (folder / name).write_text(name)
    return folder


def test_a_small_model_is_written_as_one_file(tmp_path):
    target = tmp_path / "exports" / "final"
    writer = HfFolderWriter(target, write_source(tmp_path / "source"), CONFIG)
    partial = writer.write(TENSORS.items())
    assert not target.exists(), "it must not be there before it is known to be good"
    assert check_weights(partial) == SHAPES
    writer.folder.commit()
    assert not partial.exists()
    names = sorted(path.name for path in target.iterdir())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert read_model_config(target) == CONFIG
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    written = load_file(target / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        "a": torch.float32,
        "b": torch.bfloat16,
        "c": torch.float32,
    }


def test_a_large_model_is_written_in_shards_with_an_index(tmp_path):
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(5)}  # 40 bytes each
    writer = HfFolderWriter(tmp_path / "final", write_source(tmp_path / "source"), CONFIG, max_shard_bytes=100)
    writer.write(tensors.items())
    writer.folder.commit()
    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    index = json.loads((tmp_path / "final" / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 200},
        "weight_map": {"t0": first, "t1": first, "t2": second, "t3": second, "t4": third},
    }
    assert check_weights(tmp_path / "final") == {name: [10] for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / "final" / index["weight_map"][name])[name], tensor)


def test_a_tensor_beyond_the_shard_size_gets_its_own_file(tmp_path):
    tensors = {"small": torch.zeros(1), "large": torch.zeros(100), "last": torch.zeros(1)}
    writer = HfFolderWriter(tmp_path / "final", write_source(tmp_path / "source"), CONFIG, max_shard_bytes=50)
    writer.write(tensors.items())
    writer.folder.commit()
    weight_map = json.loads((tmp_path / "final" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3


def test_the_stream_may_reuse_its_buffer(tmp_path):
    def stream() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.zeros(3)
        for number in range(3):
            buffer.fill_(number)
            yield f"t{number}", buffer

    writer = HfFolderWriter(tmp_path / "final", write_source(tmp_path / "source"), CONFIG)
    writer.write(stream())
    writer.folder.commit()
    written = load_file(tmp_path / "final" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in written.items()} == {
        "t0": [0.0] * 3,
        "t1": [1.0] * 3,
        "t2": [2.0] * 3,
    }


def test_an_interrupted_write_leaves_no_target_and_can_be_repeated(tmp_path):
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", TENSORS["a"]
        yield "b", TENSORS["b"]
        raise ConnectionError("a rank is gone")

    source = write_source(tmp_path / "source")
    with pytest.raises(ConnectionError):
        HfFolderWriter(tmp_path / "final", source, CONFIG, max_shard_bytes=1).write(broken())
    assert not (tmp_path / "final").exists()
    writer = HfFolderWriter(tmp_path / "final", source, CONFIG)
    writer.write(TENSORS.items())
    writer.folder.commit()
    assert check_weights(tmp_path / "final") == SHAPES
    assert not list((tmp_path / "final").glob("shard-*"))


def test_an_existing_target_is_refused(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "theirs").touch()
    writer = HfFolderWriter(tmp_path / "final", write_source(tmp_path / "source"), CONFIG)
    with pytest.raises(ConfigError, match="export = .*final: must be a new or empty folder, and it is not"):
        writer.write(TENSORS.items())
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["theirs"]


def test_a_full_disk_is_told_as_such_and_leaves_nothing(tmp_path):
    writer = HfFolderWriter(tmp_path / "final", write_source(tmp_path / "source"), CONFIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: .*shard-00000.safetensors"):
            writer.write({"a": torch.zeros(1000)}.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_all_tensors_are_streamed_once(tmp_path, write):
    streamed = list(read_tensors(write(tmp_path / "model")))
    assert sorted(name for name, _ in streamed) == sorted(TENSORS)
    for name, tensor in streamed:
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def change_last_element(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def rename_tensor(folder: Path) -> None:
    save_file({{"a": "d"}.get(name, name): tensor for name, tensor in TENSORS.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("change", [change_last_element, change_tokenizer, rename_tensor])
def test_a_fingerprint_tells_folders_apart_and_copies_not(tmp_path, change):
    folder = write_single(tmp_path / "model")
    digest = fingerprint_folder(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint_folder(tmp_path / "copy") == digest
    change(tmp_path / "copy")
    assert fingerprint_folder(tmp_path / "copy") != digest


def test_a_fingerprint_reads_both_ends_of_every_tensor_and_no_more(tmp_path):
    """Each of two large tensors is seen at its first and last element; what lies between is not."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def digest(name: str, place: int) -> str:
        tensors = {"a": torch.zeros(10_000), "b": torch.zeros(10_000)}
        tensors[name][place] = 1
        save_file(tensors, folder / "model.safetensors")
        return fingerprint_folder(folder)

    digests = {(name, place): digest(name, place) for name in "ab" for place in (0, 5000, -1)}
    assert digests["a", 5000] == digests["b", 5000]
    assert len(set(digests.values())) == 5


def test_a_config_is_changed_in_a_copy():
    source = {"torch_dtype": "bfloat16", "max_position_embeddings": 8, "rope_parameters": {"rope_theta": 1.0}}
    assert model_config_for(source, "float32", 16, 5.0) == {
        "dtype": "float32",
        "max_position_embeddings": 16,
        "rope_theta": 5.0,
        "rope_parameters": {"rope_theta": 5.0},
    }
    assert model_config_for(source, "float32") == {
        "dtype": "float32",
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_theta": 1.0},
    }
    assert source["rope_parameters"] == {"rope_theta": 1.0}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_weights_are_open_to_whom_other_files_are(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"weight": torch.ones(3)}, tmp_path / "weights.safetensors")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
