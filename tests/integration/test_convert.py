"""`megatron-fipo convert` on a run's checkpoints: what it makes, what it refuses, and what it leaves behind."""

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard as HubCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fipo.config.algorithm_card import effective_algorithm
from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.safetensors_file import SafetensorsWriter
from megatron_fipo.platform.checkpoint_reader import read_index
from megatron_fipo.runtime import checkpoint_store
from megatron_fipo.runtime.checkpoint_store import read_checkpoint, write_manifest
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.exit_codes import FAILED, TERMINATED
from megatron_fipo.trainer.convert import to_hf as to_hf_module
from megatron_fipo.trainer.convert.command import convert
from megatron_fipo.trainer.convert.options import ConvertOptions
from megatron_fipo.trainer.convert.words import Conversion, parse
from tests.cli_ranks import CliRanks
from tests.conversions import all_files, folder_bytes
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import prompts, run_in_turn, small_run, write_inputs
from tests.tiny_models import add_output_matrix

pytestmark = pytest.mark.distributed

STEPS = 3
BYTES = ConvertOptions(verify="bytes")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and a run with a checkpoint of each step, whose two ranks share the optimizer, and so the tensors.

    Beside it, a run that does not train.
    """
    root = write_inputs(tmp_path_factory.mktemp("convert"))
    config = small_run(
        root,
        "run",
        num_steps=STEPS,
        data=prompts(root, held_out="held_out"),
        evaluation={"num_prompts": 4, "every_steps": 1},
        checkpoint={"every_steps": 1, "keep_last": STEPS, "export_dtype": "float32"},
    )
    recording = small_run(root, "recording", mode="rollout_only", num_steps=1, checkpoint={"every_steps": 1})
    for both in run_distributed(run_in_turn, 2, [config, recording]):
        assert [ended.error for ended in both] == [(), ()]
    index = read_index(root / "run" / "checkpoints" / f"step_{STEPS}" / "actor").state_dict_metadata
    assert any(len(told.chunks) > 1 for name, told in index.items() if not name.startswith("optimizer"))
    return root


def convert_here(direction: Any, source: Path, target: Path, **options: Any) -> str:
    """Convert on the ranks of this world; the error that came of it, or ""."""
    try:
        convert(Conversion(direction=direction, source=source, target=target, options=replace(BYTES, **options)))
    except (ConfigError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What it makes.


@pytest.fixture(scope="module")
def converted(root: Path) -> Path:
    """The newest checkpoint by the command, on two ranks; the one before, on one."""
    out = root / "converted"
    out.mkdir()
    with CliRanks(
        root / "two ranks", ["convert", "to-hf", root / "run", out / "newest", "--max-file-gib", 0.0001]
    ) as two:
        assert two.wait(120)[0] == [0, 0], two.told()
    assert "tensors have the checkpoint's shapes and bytes" in two.told()
    assert "logits on the run's own prompts and responses: float32: largest difference" in two.told()
    words = ["convert", "to-hf", root / "run" / "checkpoints" / "step_2", out / "before"]
    with CliRanks(root / "one rank", words, world_size=1) as one:
        assert one.wait(120)[0] == [0], one.told()
    assert leftovers(out) == ["before", "newest"]
    return out


def test_the_newest_checkpoint_becomes_what_the_run_exports(root: Path, converted: Path) -> None:
    exported, newest = folder_bytes(root / "run" / "export"), folder_bytes(converted / "newest")
    assert len(list((converted / "newest").glob("*.safetensors"))) > 3
    assert newest == exported
    before = folder_bytes(converted / "before")
    assert before.keys() == newest.keys()
    assert sum(before[name] != newest[name] for name in before) > len(before) / 2


def test_it_holds_everything_beside_the_weights(root: Path, converted: Path) -> None:
    folder, source = converted / "newest", root / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32" and config["vocab_size"] == 301
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    card = effective_algorithm(small_run(root, "run").algorithm)
    assert (folder / "effective_algorithm.txt").read_text() == card + "\n"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = folder_bytes(folder)
    assert index["weight_map"].keys() == tensors.keys()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in model.state_dict().values()) - (
        model.lm_head.weight.nbytes
    )
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "7"}], tokenize=False)
    mode = (folder / "config.json").stat().st_mode
    assert all(path.stat().st_mode == mode for path in folder.iterdir()), "open to whom other new files are"


def test_the_card_tells_of_algorithm_metrics_and_step(root: Path, converted: Path) -> None:
    for name, step in (("newest", STEPS), ("before", STEPS - 1)):
        text = (converted / name / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front) == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["megatron-fipo", "reinforcement-learning", "fipo"],
        }
        assert HubCard(text).data.library_name == "transformers"
        assert f"# model, after {step} steps of training" in body
        assert effective_algorithm(small_run(root, "run").algorithm) in body
        assert f"## Metrics of step {step}\n" in body and "| `train/loss` | " in body and "`time/" not in body
        rows = [line for line in body.splitlines() if line.startswith("| ") and line[2].isdigit()]
        assert [row.split(" | ")[0] for row in rows] == [f"| {number}" for number in range(step + 1)]
        assert "- logits on the run's own prompts and responses: float32: largest difference" in body


def test_the_number_of_ranks_does_not_show(root: Path, tmp_path: Path) -> None:
    for world_size in (1, 2, 3):
        assert not any(run_distributed(convert_both_ways, world_size, root, tmp_path / str(world_size)))
    for direction in ("hf", "checkpoint"):
        first = all_files(tmp_path / "1" / direction)
        assert len(first) > 8
        for other in ("2", "3"):
            files = all_files(tmp_path / other / direction)
            assert files.keys() == first.keys()
            assert [name for name in first if first[name] != files[name]] == []


def convert_both_ways(root: Path, out: Path) -> str:
    size = {"max_file_bytes": 100_000}
    return convert_here("to-hf", root / "run", out / "hf", **size) + convert_here(
        "to-megatron", out / "hf", out / "checkpoint", **size
    )


def test_precisions(root: Path, tmp_path: Path) -> None:
    """Rounding once is no difference, and what was rounded is compared as it is."""
    (told,) = run_distributed(through_precisions, 1, root, tmp_path)
    assert told == [""] * 5 + [f"ConversionError: {tmp_path}/rounded differs from"]
    types = {json.loads((tmp_path / name / "config.json").read_text())["dtype"] for name in ("rounded", "again")}
    assert types == {"bfloat16"}
    assert folder_bytes(tmp_path / "rounded") == folder_bytes(tmp_path / "again")


def through_precisions(root: Path, out: Path) -> list[str]:
    run, everything = root / "run", {"verify": "all"}
    told = [
        convert_here("to-hf", run, out / "rounded", dtype="bfloat16", **everything),
        convert_here("to-hf", run, out / "exact", **everything),
        convert_here("to-megatron", out / "exact", out / "checkpoint", dtype="bfloat16", **everything),
        convert_here("to-hf", out / "checkpoint", out / "again", **everything),
        convert_here("verify", out / "checkpoint", out / "exact", **everything),
        convert_here("verify", run / "checkpoints" / "step_2", out / "rounded"),
    ]
    return [each.split(" differs from ")[0] + " differs from" if " differs from " in each else each for each in told]


# What it refuses.


def without_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def truncated(checkpoint: Path) -> None:
    os.truncate(weights_file(checkpoint), 10_000)


def corrupted(checkpoint: Path) -> None:
    with weights_file(checkpoint).open("r+b") as file:
        file.seek(weights_file(checkpoint).stat().st_size // 2)
        file.write(b"other bytes")


def of_a_later_release(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))


def without_description(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "model")
    sealed_again(checkpoint)


def of_another_model(checkpoint: Path) -> None:
    change_config(checkpoint, num_hidden_layers=5, layer_types=None)


def of_another_width(checkpoint: Path) -> None:
    change_config(checkpoint, intermediate_size=224)


def with_a_contradiction(checkpoint: Path) -> None:
    change_config(checkpoint, num_hidden_layers=5)


def of_no_known_architecture(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def with_code(checkpoint: Path) -> None:
    (checkpoint / "model" / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    change_config(checkpoint, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})


class Exploit:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran_from_checkpoint",)


def with_code_in_the_index(checkpoint: Path) -> None:
    index = read_index(checkpoint / "actor")
    index.planner_data = Exploit()
    (checkpoint / "actor" / ".metadata").write_bytes(pickle.dumps(index))
    sealed_again(checkpoint)


def with_code_in_a_tensor(checkpoint: Path) -> None:
    """An archive that PyTorch would read whole, in the place of a tensor's."""
    index = read_index(checkpoint / "actor")
    key = next(key for key in index.storage_data if "word_embeddings" in key.fqn)
    torch.save(Exploit(), checkpoint / "actor" / "other")
    length = (checkpoint / "actor" / "other").stat().st_size
    index.storage_data[key] = replace(index.storage_data[key], relative_path="other", offset=0, length=length)
    (checkpoint / "actor" / ".metadata").write_bytes(pickle.dumps(index))
    sealed_again(checkpoint)


def weights_file(checkpoint: Path) -> Path:
    return checkpoint / "actor" / "__0_0.distcp"


def change_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    sealed_again(checkpoint)


def sealed_again(checkpoint: Path) -> None:
    """A manifest that fits what an attacker has put there."""
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, STEPS, {}, {})


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (without_manifest, "ConfigError: RUN|CHECKPOINT = {bad}: is neither a checkpoint (manifest.json"),
    "truncated": (truncated, "CheckpointError: {bad}/actor/__0_0.distcp: has 10000 bytes where"),
    "corrupted": (corrupted, "CheckpointError: {bad}/actor/__0_0.distcp: other bytes than were written (SHA-256 diff"),
    "newer": (of_a_later_release, "NewerFormatError: {bad}/manifest.json: format version 99, and this release reads 1"),
    "not described": (without_description, "CheckpointError: {bad}/model: is missing; a checkpoint that can be conv"),
    "more layers": (of_another_model, "CheckpointError: {bad}/actor is of another model than it describes: it has no"),
    "wider": (
        of_another_width,
        "CheckpointError: {bad}/actor is of another model than it describes: decoder.layers.0.",
    ),
    "contradiction": (
        with_a_contradiction,
        "ConfigError: RUN|CHECKPOINT = {bad}/model: describes no model that transfo",
    ),
    "GPT-2": (of_no_known_architecture, "ConfigError: config.json = GPT2LMHeadModel: is no architecture that is conv"),
    "own code": (with_code, "ConfigError: RUN|CHECKPOINT = {bad}/model: asks for code of its own to be run (auto"),
    "code in the index": (with_code_in_the_index, "CheckpointError: {bad}/actor/.metadata asks for posix.system, whi"),
    "code in a tensor": (
        with_code_in_a_tensor,
        "CheckpointError: {bad}/actor/other holds a tensor that cannot be read",
    ),
}


@pytest.fixture(scope="module")
def refusals(root: Path) -> dict[str, tuple[str, list[str]]]:
    return run_distributed(refuse_all, 1, root)[0]


def refuse_all(root: Path) -> dict[str, tuple[str, list[str]]]:
    """What is said of every bad checkpoint, and what is left behind."""
    told = {}
    os.chdir(root)
    for kind, (damage, _) in BAD_CHECKPOINTS.items():
        here = root / "bad" / kind
        shutil.copytree(root / "run" / "checkpoints" / f"step_{STEPS}", here / "checkpoint")
        damage(here / "checkpoint")
        told[kind] = (convert_here("to-hf", here / "checkpoint", here / "out", verify="all"), leftovers(here))
    told["no weights"] = convert_here("to-hf", root / "recording", root / "bad" / "out"), leftovers(root / "bad")
    return told


def test_a_run_that_did_not_train_has_nothing_to_convert(
    root: Path, refusals: dict[str, tuple[str, list[str]]]
) -> None:
    told, left = refusals["no weights"]
    assert told == (
        f"ConfigError: RUN|CHECKPOINT = {root}/recording/checkpoints/step_1: has no weights, as no checkpoint of a "
        "rollout_only run has; name a run that trains"
    )
    assert sorted(left) == sorted(BAD_CHECKPOINTS)


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_told_in_one_line_and_nothing_of_it_runs(
    root: Path, refusals: dict[str, tuple[str, list[str]]], kind: str
) -> None:
    told, left = refusals[kind]
    assert told.startswith(BAD_CHECKPOINTS[kind][1].format(bad=root / "bad" / kind / "checkpoint"))
    assert "\n" not in told
    assert left == ["checkpoint"]
    assert not (root / "ran_from_checkpoint").exists() and not list((root / "bad").rglob("ran"))


def test_what_an_exploit_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Exploit()))
    assert (tmp_path / "ran_from_checkpoint").exists(), "else the refusals above are of something harmless"


def test_of_a_run_the_newest_whole_checkpoint_is_taken(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(root / "run" / "checkpoints", run / "checkpoints")
    corrupted(run / "checkpoints" / f"step_{STEPS}")
    truncated(run / "checkpoints" / f"step_{STEPS - 1}")
    told = run_distributed(from_damaged_run, 2, run)[0]
    assert told[0] == ""
    assert f"after {STEPS - 2} steps" in (run / "out" / "README.md").read_text()
    assert told[1].startswith(f"CheckpointError: {run}/checkpoints/step_{STEPS}/actor/__0_0.distcp: other bytes than")
    assert told[
        2
    ] == f"ConfigError: --step = 9: must be one of 1, 2, 3: {run} has no other checkpoints; choose one of " + (
        "these, or leave --step out for the newest"
    )
    assert told[3].startswith(
        "ConfigError: --step = 2: must be left out where a checkpoint is named, which is of step 1"
    )
    assert told[4].startswith(f"ConfigError: RUN|CHECKPOINT = {run}/nowhere: is neither a checkpoint (manifest.json) ")


def from_damaged_run(run: Path) -> list[str]:
    return [
        convert_here("to-hf", run, run / "out"),
        convert_here("to-hf", run, run / "other", step=STEPS),
        convert_here("to-hf", run, run / "other", step=9),
        convert_here("to-hf", run / "checkpoints" / "step_1", run / "other", step=2),
        convert_here("to-hf", run / "nowhere", run / "other"),
    ]


def half_a_model(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def other_shapes(folder: Path) -> None:
    change(folder, intermediate_size=224)


def fewer_layers(folder: Path) -> None:
    change(folder, num_hidden_layers=3, layer_types=None)


def own_code(folder: Path) -> None:
    change(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})


def another_output_matrix(folder: Path) -> None:
    """Of a model that is tied, so that it should have none."""
    add_output_matrix(folder, 0.0)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent": (shutil.rmtree, "ConfigError: HF = {bad}: must be a Hugging Face model folder, and there is no"),
    "truncated": (
        half_a_model,
        "ConfigError: HF = {bad}: has a cut-off weight file: model.safetensors is 100000",
    ),
    "other shapes": (
        other_shapes,
        "ConfigError: HF = {bad}: has with shape [112, 64] model.layers.0.mlp.gate_proj.weigh",
    ),
    "fewer layers": (
        fewer_layers,
        "ConfigError: HF = {bad}: has 12 tensors that config.json does not ask for, model.l",
    ),
    "own code": (
        own_code,
        "ConfigError: HF = {bad}: asks for code of its own to be run (auto_map in config.json)",
    ),
    "another output matrix": (
        another_output_matrix,
        "ConfigError: HF = {bad}: has lm_head.weight with other bytes, though config.json ties it to model.embed_tok",
    ),
}


def test_a_bad_folder_is_told_in_one_line(root: Path, tmp_path: Path) -> None:
    told = run_distributed(refuse_folders, 1, root, tmp_path)[0]
    for kind, (_, text) in BAD_FOLDERS.items():
        assert told[kind].startswith(text.format(bad=tmp_path / kind)), told[kind]
        assert "\n" not in told[kind]
    assert "checkpoint" not in leftovers(tmp_path) and ".checkpoint.partial" not in leftovers(tmp_path)


def refuse_folders(root: Path, out: Path) -> dict[str, str]:
    told = {}
    for kind, (damage, _) in BAD_FOLDERS.items():
        shutil.copytree(root / "model", out / kind)
        damage(out / kind)
        told[kind] = convert_here("to-megatron", out / kind, out / "checkpoint")
    return told


def test_a_taken_place_stays_as_it_is(root: Path, tmp_path: Path) -> None:
    for kind in ("folder", "file", "link"):
        (tmp_path / kind).mkdir()
    (tmp_path / "folder" / "out").mkdir()
    (tmp_path / "folder" / "out" / "mine").touch()
    (tmp_path / "file" / "out").touch()
    (tmp_path / "link" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    told = run_distributed(into_taken_places, 1, root, tmp_path)[0]
    for kind in ("folder", "file", "link"):
        assert told[kind].startswith(
            f"ConfigError: OUT = {tmp_path}/{kind}/out: must be a new or empty folder, and it is"
        )
        assert leftovers(tmp_path / kind) == ["out"]
    assert leftovers(tmp_path / "folder" / "out") == ["mine"]
    assert told["empty"] == "" and (tmp_path / "empty" / "config.json").is_file()
    assert told["file above"].startswith(
        f"ConfigError: OUT = {tmp_path}/file/out/deeper: must be in a folder that this"
    )


def into_taken_places(root: Path, out: Path) -> dict[str, str]:
    told = {kind: convert_here("to-hf", root / "run", out / kind / "out") for kind in ("folder", "file", "link")}
    told["empty"] = convert_here("to-hf", root / "run", out / "empty")
    return told | {"file above": convert_here("to-hf", root / "run", out / "file" / "out" / "deeper")}


def test_what_is_whole_stays_so(root: Path, tmp_path: Path) -> None:
    """A place inside of it is refused before anything is read."""
    run = tmp_path / "run"
    shutil.copytree(root / "run" / "checkpoints" / "step_1", run / "checkpoints" / "step_1")
    (run / "config.yaml").touch()
    shutil.copytree(root / "model", tmp_path / "model")
    before = all_files(tmp_path)
    told = run_distributed(into_whole_things, 1, run, tmp_path / "model")[0]
    for (place, what), each in zip(
        (
            (run / "checkpoints" / "step_1", "a checkpoint"),
            (run / "checkpoints", "where a run has its checkpoints"),
            (tmp_path / "model", "a model folder"),
        ),
        told,
        strict=True,
    ):
        assert each.startswith("ConfigError: OUT = ") and f": must not lie in {place}, which is {what}; choo" in each
    assert all_files(tmp_path) == before


def into_whole_things(run: Path, model: Path) -> list[str]:
    return [
        convert_here("to-hf", run / "nowhere", run / "checkpoints" / "step_1" / "deeper" / "hf"),
        convert_here("to-megatron", model, run / "checkpoints" / "step_2"),
        convert_here("to-megatron", model, model / "checkpoint"),
    ]


# What it leaves behind.


def as_another_user(root: Path, out: Path) -> str:
    # Not as root, who may write everywhere; what is to be read may be read.
    os.seteuid(65534)
    return convert_here("to-hf", root, out / "export")


def test_a_place_that_may_not_be_written_to_is_told(root: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(root / "run" / "checkpoints", folder / "run" / "checkpoints")
        folder.chmod(0o755)
        told = run_distributed(as_another_user, 1, folder / "run", folder)[0]
        assert told.startswith(f"ConversionError: {folder}/.export.partial: cannot be made (Permission denied); ")
        assert leftovers(folder) == ["run"]


def from_closed_places(places: list[Path], out: Path) -> list[str]:
    return [as_another_user(place, out) for place in places]


def test_a_place_that_may_not_be_read_is_told() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "run" / "checkpoints").mkdir(parents=True)
        (folder / "closed").mkdir()
        closed = [folder / "run" / "checkpoints", folder / "closed"]
        for place in closed:
            place.chmod(0o000)
        told = run_distributed(from_closed_places, 1, [folder / "run", folder / "closed"], folder)[0]
        for text, source, place in zip(told, ("run", "closed"), closed, strict=True):
            assert text.startswith(
                f"ConfigError: RUN|CHECKPOINT = {folder / source}: must be a place that this user may "
            )
            assert f"read, and {place}" in text and "(Permission denied); mend its permissions" in text
            assert "\n" not in text


def on_a_full_disk(root: Path, out: Path) -> list[str]:
    """Files may not grow beyond so much: the same error as on a full disk, at every place where one is written."""
    told = []
    for limit in (0, 1000, 50_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        told += [
            convert_here("to-hf", root / "run", out / "export"),
            convert_here("to-megatron", root / "model", out / "checkpoint"),
        ]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return told


def test_a_full_disk_leaves_nothing(root: Path, tmp_path: Path) -> None:
    told = run_distributed(on_a_full_disk, 1, root, tmp_path)[0]
    for each in told:
        assert each.startswith(f"ConversionError: {tmp_path}/."), each
        assert "cannot be written (File too large); free some space" in each
    assert leftovers(tmp_path) == []


def killed_on_the_way(root: Path, out: Path) -> None:
    write = SafetensorsWriter.write

    def die(self: SafetensorsWriter, name: str, tensor: Any) -> Any:
        if name == "model.layers.2.mlp.up_proj.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, name, tensor)

    to_hf_module.SafetensorsWriter.write = die  # type: ignore[method-assign]
    convert_here("to-hf", root / "run", out / "export")


def interrupted_on_the_way(root: Path, out: Path) -> bool:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    to_hf_module.SafetensorsWriter.write = interrupt  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        convert_here("to-hf", root / "run", out / "export")
        return False
    return True


def test_a_conversion_that_is_killed_leaves_no_folder_but_a_hidden_one(root: Path, tmp_path: Path) -> None:
    assert run_distributed(interrupted_on_the_way, 1, root, tmp_path) == [True]
    assert leftovers(tmp_path) == []
    with pytest.raises(AssertionError, match="died without a result"):
        run_distributed(killed_on_the_way, 1, root, tmp_path)
    assert leftovers(tmp_path) == [".export.partial"]
    assert run_distributed(convert_here, 1, "to-hf", root / "run", tmp_path / "export") == [""]
    assert leftovers(tmp_path) == ["export"]


@pytest.mark.parametrize(
    ("number", "statuses", "end"),
    [
        (signal.SIGTERM, [TERMINATED, TERMINATED], "ended on SIGTERM; "),
        (signal.SIGKILL, [-signal.SIGKILL, FAILED], r"stopped: rank 0 \(.*\) died without a word; "),
    ],
)
def test_a_conversion_that_is_interrupted_ends_on_every_rank_and_can_be_begun_anew(
    number: int, statuses: list[int], end: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_interrupted(*_: Any) -> None:
        os.kill(os.getpid(), number)
        threading.Event().wait()

    words = ["convert", "to-hf", root / "run", tmp_path / "export", "--verify", "bytes"]
    # The ranks are forked from this process.
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", be_interrupted)
        with CliRanks(tmp_path / "ranks", words) as ranks:
            assert ranks.wait(60)[0] == statuses, ranks.told()
    again = f"the same command begins anew, and removes {tmp_path}/.export.partial first"
    last = ranks.last_line(statuses.index(max(statuses)))
    assert re.fullmatch(f"megatron-fipo: the conversion {end}{re.escape(again)}", last), last
    assert leftovers(tmp_path) == [".export.partial", "ranks"]
    with CliRanks(tmp_path / "ranks", words) as ranks:
        assert ranks.wait(60)[0] == [0, 0], ranks.told()
    assert leftovers(tmp_path) == ["export", "ranks"]


def test_a_difference_leaves_no_folder(root: Path, tmp_path: Path) -> None:
    told = run_distributed(with_a_bad_disk, 2, root, tmp_path)
    assert told[0] == told[1].replace("RunError", "ConversionError")
    assert told[0].startswith(
        f"ConversionError: {tmp_path}/.export.partial differs from {root}/run/checkpoints/step_3: "
    )
    assert "model.norm.weight has other bytes" in told[0]
    assert leftovers(tmp_path) == []


def with_a_bad_disk(root: Path, out: Path) -> str:
    write = SafetensorsWriter.write

    def write_wrongly(self: SafetensorsWriter, name: str, tensor: Any) -> Any:
        record = write(self, name, tensor)
        if name == "model.norm.weight":
            os.pwrite(self._file, b"\x01", self._places[name] + len(self._header))
        return record

    to_hf_module.SafetensorsWriter.write = write_wrongly  # type: ignore[method-assign]
    return convert_here("to-hf", root / "run", out / "export")


# Words.


def test_words() -> None:
    found = parse(
        ["to-hf", "a", "b", "--dtype", "bfloat16", "--max-file-gib", "2", "--memory-gib", "0.5", "--step", "7"]
    )
    assert found == Conversion(
        direction="to-hf",
        source=Path("a"),
        target=Path("b"),
        options=ConvertOptions(dtype="bfloat16", max_file_bytes=2 * 1024**3, memory_bytes=1024**3 // 2, step=7),
    )
    assert parse(["verify", "a", "b", "--trust-checkpoint"]).options == ConvertOptions(check_hashes=False)
    with pytest.raises(ConfigError, match=r"--max-file-gib = -1.0: must be a positive number"):
        parse(["to-megatron", "a", "b", "--max-file-gib", "-1"])


@pytest.mark.parametrize("words", [["-m", "megatron_fipo.cli", "convert"], ["tools/convert_checkpoint.py"]])
def test_help_is_instant(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words, "to-hf", "--help"], capture_output=True, text=True, check=True
    )
    assert "RUN|CHECKPOINT OUT" in " ".join(done.stdout.split())
    assert "import time" in done.stderr
    assert not any(line.endswith((" torch", " numpy", " transformers")) for line in done.stderr.splitlines())


def test_the_store_reads_what_was_converted(root: Path, tmp_path: Path) -> None:
    assert run_distributed(convert_here, 1, "to-megatron", root / "model", tmp_path / "step_0") == [""]
    found = read_checkpoint(tmp_path / "step_0", check_hashes=True)
    assert (found.manifest.step, found.manifest.layout) == (0, {})
    assert checkpoint_store.CheckpointStore(tmp_path).newest_valid() == found
