"""The command line: what it says, how it ends, and how quickly."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.cli import main
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.load import dump_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.exit_codes import BAD_INPUT
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.run_lock import hold_run_directory
from megatron_fipo.trainer.ranks import check_visible_devices
from tests.integration.small_runs import prompts, read_lines, small_run, write_inputs

PYTHON = [sys.executable, "-m", "megatron_fipo.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("cli"))


def write_config(config: RunConfig) -> Path:
    path = config.output_dir.with_suffix(".yaml")
    path.write_text(dump_config(config))
    return path


def run_command(
    *words: object,
    prefix: list[str] = PYTHON,
    timeout_s: float = 120.0,
    variables: dict[str, str] | None = None,
) -> tuple[int, str, str]:
    """Exit status and both outputs; everything that the command started is gone afterwards.

    Args:
        words: The command's words.
        prefix: The program.
        timeout_s: Time after which the test fails.
        variables: Added to the environment.
    """
    process = subprocess.Popen(
        [*prefix, *map(str, words)],
        env=ENVIRONMENT | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def cpu_seconds_of_children() -> float:
    """Unlike the clock on the wall, it does not run faster on a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# What needs no library.

USAGE = "megatron-fipo train|evaluate|check|serve CONFIG.yaml [--section.field value ...]"


def test_without_words_the_usage_is_shown() -> None:
    code, out, err = run_command()
    assert (code, err) == (2, "")
    assert out.startswith(USAGE)


def test_help_shows_the_usage() -> None:
    for word in ("--help", "-h"):
        code, out, err = run_command(word)
        assert (code, err) == (0, "")
        assert out.startswith(USAGE)
        for command in ("train", "evaluate", "inspect", "convert", "check", "serve"):
            assert f"\n  {command} " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "megatron-fipo: no command 'trian'"),
        (["train"], "megatron-fipo: train needs a configuration file first"),
        (["train", "--num_steps", "3"], "megatron-fipo: train needs a configuration file first"),
    ],
)
def test_words_that_make_no_command_are_told_with_the_usage(words: list[str], message: str) -> None:
    code, out, err = run_command(*words)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == message
    assert USAGE in err


def test_train_help_lists_the_fields_with_their_documentation() -> None:
    started = cpu_seconds_of_children()
    code, out, err = run_command("train", "--help")
    assert (code, err) == (0, "")
    assert cpu_seconds_of_children() - started < 3
    assert out.startswith("usage: megatron-fipo train CONFIG.yaml [--section.field value ...]\n")
    shown = " ".join(out.split())
    for text in (
        "--parallelism.context_parallel_size INT Ranks that share every sequence, in zigzag chunks. (default: 1)",
        "--algorithm.influence_clip_low FLOAT Lower bound of the influence weight f itself",
        "--data.train.task TEXT Name of the task, such as chain_sum. (required)",
        "algorithm (type grpo): Policy loss: fipo, dapo, grpo, dr_grpo, gspo, cispo, sapo or gmpo. GRPO (arXiv:",
    ):
        assert text in shown


def test_help_beside_a_file_shows_the_files_values(root: Path) -> None:
    config = write_config(small_run(root, "helped"))
    code, out, err = run_command("train", config, "--rollout.temperature", "0.6", "--help")
    assert (code, err) == (0, "")
    shown = " ".join(out.replace("│", " ").split())
    assert "Sampling temperature; log-probabilities are taken at it everywhere. (default: 0.6)" in shown
    assert "Samples of each prompt. (default: 4)" in shown


BAD_CONFIGURATIONS = {
    "a missing file": (["absent.yaml"], "configuration file = absent.yaml: there is no such file; correct the path"),
    "an unknown key": (
        ["{config}", "--rollout.temprature", "0.7"],
        "rollout.temprature = 0.7: there is no such field in rollout; did you mean temperature?",
    ),
    "a value out of range": (
        ["{config}", "--rollout.top_p", "2"],
        "rollout.top_p = 2.0: must lie in (0, 1]; 1.0 is the usual value",
    ),
    "a layout that does not divide the world": (
        ["{config}", "--parallelism.context_parallel_size", "2"],
        "parallelism = tensor 1 × context 2 × pipeline 1 = 2: must divide the world: world size 1 = tensor 1 × context "
        "2 × pipeline 1 × data, and 1 / 2 is not a whole number; start a multiple of 2 ranks, or change a size",
    ),
    "a directory that holds something else": (
        ["{config}", "--output_dir", "{root}"],
        "output_dir = {root}: must be a new or empty directory, or that of a run to go on with, and it is neither; "
        "choose another directory or remove this one",
    ),
}


@pytest.mark.parametrize("kind", BAD_CONFIGURATIONS)
def test_a_bad_configuration_is_told_at_once_in_one_line(kind: str, root: Path) -> None:
    words, message = BAD_CONFIGURATIONS[kind]
    config = write_config(small_run(root, "bad"))
    started = cpu_seconds_of_children()
    # Every import is reported on a line of its own.
    code, out, err = run_command(
        "train",
        *(word.format(config=config, root=root) for word in words),
        prefix=[sys.executable, "-X", "importtime", *PYTHON[1:]],
    )
    elapsed = cpu_seconds_of_children() - started
    lines = err.splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    assert "megatron_fipo.config.run" in imported
    assert not {"torch", "numpy", "transformers", "megatron.core"} & imported
    assert [line for line in lines if not line.startswith("import time:")] == [
        f"megatron-fipo: {message.format(root=root)}"
    ]
    assert (code, out) == (2, "")
    assert elapsed < 3


def test_a_good_configuration_is_checked_in_silence(root: Path) -> None:
    config = write_config(small_run(root, "good"))
    assert run_command(
        "check", config, "--parallelism.tensor_model_parallel_size", 2, variables={"WORLD_SIZE": "4"}
    ) == (0, "", "")
    assert not (root / "good").exists()


CHECKED = {
    "world size": (
        ["--parallelism.tensor_model_parallel_size", "3"],
        "parallelism = tensor 3 × context 1 × pipeline 1 = 3: must divide the world: world size 4",
    ),
    "run directory": (["--output_dir", "{root}"], "output_dir = {root}: must be a new or empty directory"),
    "field": (["--num_step", "3"], "num_step = 3: there is no such field in the configuration"),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_check_tells_what_is_wrong(kind: str, root: Path) -> None:
    words, message = CHECKED[kind]
    config = write_config(small_run(root, "checked"))
    code, out, err = run_command(
        "check", config, *(word.format(root=root) for word in words), variables={"WORLD_SIZE": "4"}
    )
    assert (code, out) == (2, "")
    assert err.startswith(f"megatron-fipo: {message.format(root=root)}")
    assert err.count("\n") == 1


def test_check_looks_into_the_run_that_is_to_go_on(root: Path) -> None:
    run = small_run(root, "looked_into")
    config = write_config(run)
    RunDirectory.create(run.output_dir, dump_config(run))
    store = CheckpointStore(run.output_dir / "checkpoints")
    for step in (1, 2):
        (store.begin(step, 0) / "progress.json").write_text("{}")
        store.commit(step, {}, {})
    with hold_run_directory(run.output_dir):
        code, _, err = run_command("check", config)
        assert code == 2 and err.count("\n") == 1
        assert "another run holds this directory: process" in err
    (store.path(2) / "progress.json").write_text("")
    code, out, err = run_command("check", config)
    assert (code, out) == (0, "")
    assert err.startswith("checkpoint of step 2 is damaged and left out: ") and err.count("\n") == 1
    metrics = run.output_dir / "metrics.jsonl"
    metrics.write_text('{"step": "7"}\n')
    code, _, err = run_command("check", config)
    assert code == 2 and "line 1 of metrics.jsonl is of no step" in err and err.count("\n") == 1
    metrics.unlink()
    metrics.symlink_to("/proc/self/mem")
    code, _, err = run_command("check", config)
    assert code == 0, "the run itself ends with 85 then"
    assert "metrics.jsonl: cannot be read (Input/output error)" in err and err.count("\n") == 1
    metrics.unlink()
    (store.path(1) / "manifest.json").unlink()
    code, _, err = run_command("check", config)
    assert code == 2
    assert "none of its 2 checkpoints is whole; bring back a copy" in err.splitlines()[-1]


def test_several_slurm_tasks_are_ranks_of_one_world(root: Path) -> None:
    config = write_config(small_run(root, "slurm_task"))
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    words = ("train", config, "--parallelism.context_parallel_size", 3)
    code, _, err = run_command(*words, variables=task)
    assert code == 2
    assert "must divide the world: world size 4" in err
    # Another rank leaves the telling to rank 0.
    assert run_command(*words, variables={**task, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}) == (
        (2, "", "")
    )


def test_a_batch_script_that_forgot_srun_is_told(root: Path) -> None:
    config = write_config(small_run(root, "no_srun"))
    code, _, err = run_command("train", config, variables={"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert code == 2
    assert err.startswith("megatron-fipo: SLURM_NTASKS = 4: the job has several tasks, and this process was started")


def test_more_ranks_on_a_node_than_visible_devices_are_refused() -> None:
    check_visible_devices(num_devices=8, local_world_size=8)
    with pytest.raises(ConfigError, match=r"LOCAL_WORLD_SIZE = 8: .* sees only 1; .* --gpus-per-node, not"):
        check_visible_devices(num_devices=1, local_world_size=8)


# What needs the libraries: run in a child of this process, which has imported them.


def call_main(words: list[str], out: Path, err: Path) -> None:
    for target, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    # Threads that the parent's OpenMP has started do not exist here.
    torch.set_num_threads(1)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def call_in_child(folder: Path, *words: object) -> tuple[int, str, str]:
    out, err = folder / "out", folder / "err"
    process = multiprocessing.get_context("fork").Process(target=call_main, args=([*map(str, words)], out, err))
    process.start()
    process.join(timeout=120)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, out.read_text(), err.read_text()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def half_downloaded(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def other_tokenizer(folder: Path) -> None:
    """A tokenizer that knows one token more than the model."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 301, "content": "<more>"})
    content["model"]["vocab"]["<more>"] = 301
    path.write_text(json.dumps(content))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BAD_MODELS = {
    "absent": (shutil.rmtree, "must be a Hugging Face model folder, and there is no such folder"),
    "no config.json": (without_config, "must contain config.json, and it does not"),
    "half downloaded": (half_downloaded, "has a cut-off weight file: model.safetensors is 100000 of "),
    "another tokenizer": (other_tokenizer, "the tokenizer's ids reach 301, and the model's vocabulary has 301 tokens"),
    "no tokenizer": (without_tokenizer, "must hold the model's tokenizer files, and has neither tokenizer.json nor"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_folder_is_told_in_one_line(kind: str, root: Path, tmp_path: Path) -> None:
    damage, message = BAD_MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(root / "model", folder)
    damage(folder)
    config = write_config(small_run(root, "bad_model"))
    code, out, err = call_in_child(tmp_path, "train", config, "--model.path", folder)
    assert (code, out) == (2, "")
    assert err.startswith(f"megatron-fipo: model.path = {folder}: {message}")
    assert err.count("\n") == 1
    assert not (root / "bad_model").exists()


def test_more_evaluation_prompts_than_there_are_is_told_in_one_line(root: Path, tmp_path: Path) -> None:
    config = write_config(small_run(root, "few", data=prompts(root, held_out="held_out")))
    code, out, err = call_in_child(tmp_path, "train", config, "--evaluation.num_prompts", 512)
    assert (code, out) == (2, "")
    # Before it stand lines of the log, about the files that were read.
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        "megatron-fipo: evaluation.num_prompts = 512: must not exceed the 8 usable prompts of data.evaluation; lower "
        "it or give more prompts"
    )


def test_a_run_that_stops_says_why_and_ends_with_1(root: Path, tmp_path: Path) -> None:
    config = write_config(small_run(root, "stopped", data=prompts(root, train="hopeless")))
    code, out, err = call_in_child(tmp_path, "train", config)
    assert code == 1
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith(
        "megatron-fipo: the run stopped: step 1: rollout.max_generation_rounds = 3: none of 12 groups"
    )


def test_a_run_ends_with_0(root: Path, tmp_path: Path) -> None:
    config = write_config(small_run(root, "done"))
    code, _, err = call_in_child(tmp_path, "train", config, "--num_steps=2", "--checkpoint.export_at_end", "false")
    assert code == 0, err
    assert [line["step"] for line in read_lines(root / "done" / "metrics.jsonl")] == [0, 1, 2]
    assert not (root / "done" / "export").exists()
    assert "rank 0 INFO step 2/2, reward" in err


# Several ranks.

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]


def torchrun(*words: Any) -> tuple[int, str, str]:
    return run_command("train", *words, prefix=[*TORCHRUN, *PYTHON], timeout_s=200)


@pytest.mark.distributed
def test_a_run_under_torchrun(root: Path) -> None:
    config = write_config(small_run(root, "two_ranks", data=prompts(root, held_out="held_out"), num_steps=3))
    code, _, err = torchrun(config, "--parallelism.context_parallel_size", 2, "--num_steps", 1)
    assert code == 0, err
    folder = root / "two_ranks"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 1]
    assert (folder / "export" / "model.safetensors").exists()
    assert "2 ranks = tensor 1 × context 2 × pipeline 1 × data 1" in err
    assert "rank 0 INFO exported the model to" in err
    assert "rank 1 INFO" not in err


@pytest.mark.distributed
def test_all_ranks_end_when_one_meets_an_error(root: Path) -> None:
    """Only rank 0 reads recordings; the other would wait for its share of the batch."""
    folder = root / "damaged"
    folder.mkdir()
    (folder / "rollout_000001.npz").write_bytes(b"PK damaged")
    changes = {"mode": "train_only", "recorded_rollouts": folder, "data": None}
    config = write_config(small_run(root, "stopped_together", **changes))
    code, _, err = torchrun(config)
    assert code == 1
    message = f"megatron-fipo: the run stopped: {folder}/rollout_000001.npz: cannot be read as a recorded rollout batch"
    assert err.count(message) == 1
    # torchrun shows its own traceback, about the ranks that failed; the ranks show none.
    assert err.count("Traceback") == 1
    assert "exitcode  : 1" in err


@pytest.mark.distributed
def test_all_ranks_end_when_one_breaks_down(root: Path) -> None:
    """Rank 0 cannot write the export, as on a full disk; the other waits for it."""
    config = write_config(small_run(root, "disk_full"))
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash"]
    code, _, err = run_command("train", config, prefix=[*limited, *TORCHRUN, *PYTHON], timeout_s=200)
    assert code == 1
    assert "rank 0 INFO step 1/1" in err
    assert "File too large" in err
    assert not (root / "disk_full" / "export").exists()


@pytest.mark.parametrize(
    ("rank", "local_rank", "begins"), [(0, 0, "megatron-fipo: "), (8, 0, "megatron-fipo: rank 8 ("), (9, 1, "")]
)
def test_the_first_rank_of_each_node_tells_what_it_cannot_read(
    rank: int, local_rank: int, begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert main(["train", str(tmp_path / "missing.yaml")]) == BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith(begins) and ("missing.yaml" in told) == bool(begins)
