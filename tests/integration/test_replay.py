"""`megatron-fipo train --replay`: what it says of a dump, with what status it ends, and what it never does."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.cli import main
from megatron_fipo.config.load import dump_config
from megatron_fipo.config.safeguards import SafeguardsConfig
from megatron_fipo.display import watch  # noqa: F401  (forked ranks find it imported)
from megatron_fipo.platform.checkpoint_reader import read_index
from megatron_fipo.runtime import checkpoint_store
from megatron_fipo.runtime.exit_codes import BAD_INPUT
from megatron_fipo.runtime.files.hashed_file import hash_file
from megatron_fipo.runtime.files.json_files import write_json
from megatron_fipo.trainer import replay_command  # noqa: F401
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import run_in_turn, small_run, write_inputs
from tests.integration.test_cli import PYTHON, call_in_child, run_command

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has kept its second update without a fault, and a checkpoint."""
    root = write_inputs(tmp_path_factory.mktemp("replay"))
    config = small_run(root, "run", safeguards=SafeguardsConfig(dump_step=1, dump_update=2))
    ((ended,),) = run_distributed(run_in_turn, 1, [config])
    assert ended.error == ()
    return root


@pytest.fixture(scope="module")
def dump(root: Path) -> Path:
    return root / "run" / "dumps" / "step_1"


def everything(folder: Path) -> dict[Path, tuple[float, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime, path.read_bytes()) for path in files}


def test_an_update_is_run_again_and_nothing_is_written(root: Path, dump: Path, tmp_path: Path) -> None:
    before = everything(root)
    code, out, err = run_command("train", "--replay", dump, variables={"TMPDIR": str(tmp_path)})
    lines = out.splitlines()
    assert code == 0, err
    assert lines[:2] == [f"{dump}: step 1, update 2 of 2", "kept because it was asked for"]
    assert "the same, bit by bit" in lines
    assert everything(root) == before
    # Ten tokens with their text, and four numbers that both have.
    assert sum(line.startswith(("loss ", "gradient norm ", "kept tokens ", "denominator ")) for line in lines) == 4
    assert sum(line.rstrip().endswith("'") for line in lines) == 10
    assert "differ" not in out.replace("differing", "").replace("difference", "")


def test_another_configuration_is_told_and_ends_with_status_1(dump: Path, tmp_path: Path) -> None:
    words = ("train", "--replay", dump, "--algorithm.dual_clip", "1.01")
    code, out, _ = call_in_child(tmp_path, *words)
    assert code == 1
    assert "differs: algorithm.dual_clip: 10.0 → 1.01" in out.splitlines()
    assert any(line.startswith("NOT the same: ") for line in out.splitlines())
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("loss ")] == ["differs"]


def sealed(folder: Path) -> None:
    """Write a manifest that fits what is in the folder, as an attacker could."""
    manifest = checkpoint_store._read_manifest(folder)
    files = {name: hash_file(folder / name) for name in sorted(checkpoint_store._files(folder))}
    content = {**asdict(manifest), "files": {name: asdict(record) for name, record in files.items()}}
    version = checkpoint_store.FORMAT_VERSION
    write_json(
        folder / "manifest.json",
        {"format_version": version, "sha256": checkpoint_store._digest(content), **content},
    )


class Exploit:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def of_a_later_release(folder: Path) -> None:
    told = json.loads((folder / "dump.json").read_text())
    write_json(folder / "dump.json", told | {"format_version": 99})
    sealed(folder)


def with_other_fields(folder: Path) -> None:
    told = json.loads((folder / "dump.json").read_text())
    write_json(folder / "dump.json", told | {"place": {"step": 1}})
    sealed(folder)


def with_a_flipped_bit(folder: Path) -> None:
    content = bytearray((folder / "batch.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "batch.npz").write_bytes(content)


def cut_short(folder: Path) -> None:
    (folder / "rank_0.npz").write_bytes((folder / "rank_0.npz").read_bytes()[:-9])


def without_a_file(folder: Path) -> None:
    (folder / "rank_0.npz").unlink()


def without_weights(folder: Path) -> None:
    shutil.rmtree(folder / "actor")
    sealed(folder)


def of_other_tokens(folder: Path) -> None:
    with np.load(folder / "rank_0.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(folder / "rank_0.npz", **(arrays | {"tokens": arrays["tokens"] + 1}))
    sealed(folder)


def with_a_pickle(folder: Path) -> None:
    with np.load(folder / "rank_0.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["old_log_probs"] = np.array([Exploit(folder.parent / "made")], dtype=object)
    np.savez(folder / "rank_0.npz", allow_pickle=True, **arrays)
    sealed(folder)


def with_a_pickle_for_an_index(folder: Path) -> None:
    index = read_index(folder / "actor")
    index.planner_data = Exploit(folder.parent / "made")
    (folder / "actor" / ".metadata").write_bytes(pickle.dumps(index))
    sealed(folder)


UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "later release": (of_a_later_release, "format version 99, and this release reads 1"),
    "other fields": (with_other_fields, "dump.json: cannot be read"),
    "flipped bit": (with_a_flipped_bit, "batch.npz: other bytes than were written"),
    "cut short": (cut_short, "rank_0.npz: has "),
    "file missing": (without_a_file, "rank_0.npz: is missing"),
    "weights missing": (without_weights, "has no folder actor, which its weights were in; give a whole dump"),
    "other tokens": (of_other_tokens, "tokens are in no rank's file"),
    "pickle": (with_a_pickle, "rank_0.npz: cannot be read as arrays of an update (Object arrays cannot be loaded"),
    "pickled index": (with_a_pickle_for_an_index, "asks for posix.mkdir, which no index of a checkpoint needs"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_dump_is_refused_in_one_line_and_never_run(kind: str, dump: Path, tmp_path: Path) -> None:
    spoil, message = UNFIT[kind]
    copy = tmp_path / "dumps" / "kept_for_later"
    shutil.copytree(dump, copy)
    spoil(copy)
    code, out, err = call_in_child(tmp_path, "train", "--replay", copy)
    told = [line for line in err.splitlines() if line.startswith("megatron-fipo: ")]
    assert (code, out, len(told)) == (2, "", 1), err
    assert told[0].startswith(f"megatron-fipo: --replay = {copy}: ") and message in told[0]
    assert told[0].count(str(copy)) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "dumps" / "made").exists()


def test_what_is_no_dump_is_refused(root: Path, dump: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[list[Any], str], ...] = (
        ([], "--replay = '': must name a dump; give RUN/dumps/step_N; the configuration is the dump's"),
        (["--mode", "train"], "--replay = --mode: must name a dump"),
        ([root / "run"], "has no dump.json, so it is no dump of an update"),
        ([tmp_path / "step_3"], f"--replay = {tmp_path}/step_3: there is no such folder; give a whole dump, "),
        ([root / "run" / "checkpoints" / "step_1"], "has no dump.json, so it is no dump of an update"),
        ([dump, "--num_step", "3"], "num_step = 3: there is no such field in the configuration"),
        ([dump, "--parallelism.context_parallel_size", "2"], "must divide the world: world size 1"),
    )
    for number, (words, message) in enumerate(cases):
        folder = tmp_path / f"call_{number}"
        folder.mkdir()
        code, out, err = call_in_child(folder, "train", "--replay", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


@pytest.mark.parametrize("words", [["run.yaml", "--replay", "D"], ["run.yaml", "--replay=D"], ["--replay=D"]])
def test_a_dump_that_is_not_named_first_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == BAD_INPUT
    assert capsys.readouterr().err == (
        f"megatron-fipo: command line = {' '.join(words)}: --replay must come first, in the place of a configuration; "
        "write `megatron-fipo train --replay RUN/dumps/step_N`; the configuration is the dump's\n"
    )


def test_responses_that_the_limit_cuts_off_end_a_run_that_generates(root: Path) -> None:
    limits = SafeguardsConfig(collapse_window_steps=1, max_truncated_fraction=0.5, on_collapse="stop")
    ((ended,),) = run_distributed(run_in_turn, 1, [small_run(root, "cut_off", safeguards=limits)])
    kind, text = ended.error
    assert kind == "SafeguardError"
    assert text.startswith("step 1: the token limit has cut off ")
    assert not (root / "cut_off" / "dumps").exists()


@pytest.mark.exhaustive
def test_ranks_of_a_launcher_run_an_update_again(root: Path) -> None:
    config = small_run(
        root, "two_ranks", parallelism={"context_parallel_size": 2}, safeguards=SafeguardsConfig(dump_step=1)
    )
    path = root / "two_ranks.yaml"
    path.write_text(dump_config(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PYTHON[1:]]
    assert run_command("train", path, prefix=launcher)[0] == 0
    code, out, err = run_command("train", "--replay", config.output_dir / "dumps" / "step_1", prefix=launcher)
    assert code == 0, err
    assert "the same, bit by bit" in out.splitlines()
