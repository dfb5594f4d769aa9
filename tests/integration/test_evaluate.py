"""`megatron-fipo evaluate`: stopped and started again, on one rank and on two, inside a run and outside."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.cli import main
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import JsonlPrompts
from megatron_fipo.config.evaluate import EvaluateConfig, EvaluationData
from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.config.load import dump_config, load_config
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.reward import ExactMatchTerm, ReasoningGymTerm, RewardConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.metrics.evaluation_table import evaluation_table
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.json_files import append_lines
from megatron_fipo.trainer.evaluation.command import evaluate
from megatron_fipo.trainer.evaluation.directory import held_alone
from megatron_fipo.trainer.evaluation.files import EvaluationFiles
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import (
    ANSWER_PATTERN,
    prompts,
    read_lines,
    run_to_its_end,
    small_run,
    write_inputs,
)
from tests.tiny_models import add_output_matrix, write_tiny_model

SHOW = Path(__file__).parents[2] / "tools" / "show_evaluation.py"
SAMPLES = 4
FILES = ("responses.jsonl", "problems.jsonl", "evaluation.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_inputs(tmp_path_factory.mktemp("evaluate"))
    other_model = write_tiny_model(root / "other_model", seed=1)
    add_output_matrix(shutil.copytree(other_model, root / "with_output_matrix"), 0.0)
    (root / "empty.jsonl").write_text("")
    (root / "unanswered.jsonl").write_text('{"prompt": "1+1=", "answer": null}\n')
    return root


def small_evaluation(root: Path, name: str, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "output_dir": root / name,
        "model": ModelConfig(path=root / "model", dtype="float32"),
        "data": held_out(root, "held_out"),
        "reward": RewardConfig(
            terms={"correct": ExactMatchTerm(answer_pattern=ANSWER_PATTERN)}, require_stop=False, max_workers=1
        ),
        "rollout": RolloutConfig(max_response_tokens=12),
        "evaluation": EvaluationConfig(samples_per_problem=SAMPLES, pass_at=(2,), temperature=0.9, top_p=0.8),
        "chunk_sequences": SAMPLES,
    }
    return EvaluateConfig(**(values | changes))


def held_out(root: Path, name: str) -> EvaluationData:
    return EvaluationData(
        evaluation=JsonlPrompts(path=root / f"{name}.jsonl"), prompt_format="raw", max_prompt_tokens=16
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


# Stopped and started again.


def kill_at(place: str) -> Any:
    """An `EvaluationFiles.append` that kills its own process while it adds the second chunk of that process."""
    original, calls = EvaluationFiles.append, []

    def append(files: EvaluationFiles, results: Any, records: Any) -> None:
        calls.append(len(results))
        if len(calls) < 2:
            return original(files, results, records)
        if place == "after the chunk":
            original(files, results, records)
        else:
            append_lines(files.responses, records)
            torn = files.responses
            if place == "among the problems":
                append_lines(files.problems, [result.to_json() for result in results])
                torn = files.problems
            with torn.open("r+b") as file:
                file.truncate(torn.stat().st_size - 20)
        os.kill(os.getpid(), signal.SIGKILL)

    return append


def command(words: list[str], out: Path, kill_place: str | None) -> None:
    for stream in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    if kill_place is not None:
        EvaluationFiles.append = kill_at(kill_place)  # type: ignore[method-assign]
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_command(root: Path, *words: object, kill_place: str | None = None) -> tuple[int, str]:
    """Exit status (minus the signal that ended it) and output of the command, in a child of this process."""
    out = root / "output"
    out.unlink(missing_ok=True)
    child = get_context("fork").Process(target=command, args=([*map(str, words)], out, kill_place))
    child.start()
    child.join(timeout=120)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode, out.read_text()


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """An evaluation that nothing stopped."""
    config = small_evaluation(root, "whole")
    run_distributed(evaluate_in_turn, 1, [config])
    return config.output_dir


def test_an_evaluation_that_was_killed_goes_on_to_the_same_files(root: Path, whole: Path) -> None:
    config = small_evaluation(root, "killed")
    path = root / "killed.yaml"
    path.write_text(dump_config(config))
    # Each process adds one whole chunk and is killed at its second; the last goes on after 2 + 1 + 1 of eight.
    for place, finished in (("after the chunk", 2), ("among the responses", 3), ("among the problems", 4)):
        assert run_command(root, "evaluate", path, kill_place=place)[0] == -signal.SIGKILL
        lines = (config.output_dir / "problems.jsonl").read_bytes()
        assert lines.count(b"\n") == finished
        assert lines.endswith(b"\n") == (place != "among the problems")
    code, out = run_command(root, "evaluate", path)
    assert code == 0, out
    assert "going on after 4 of 8 problems" in out
    assert contents(config.output_dir) == contents(whole)
    # Once more: nothing is left to do, and nothing changes.
    code, again = run_command(root, "evaluate", path)
    assert (code, again.splitlines()[-2:]) == (0, out.splitlines()[-2:])
    assert "problems, accuracy so far" not in again
    assert contents(config.output_dir) == contents(whole)
    assert again.splitlines()[-1].startswith("held_out   8          ")


def test_two_processes_never_write_into_one_directory(root: Path, whole: Path) -> None:
    path = root / "whole.yaml"
    path.write_text(dump_config(small_evaluation(root, "whole")))
    before = contents(whole)
    with held_alone(whole):
        code, out = run_command(root, "evaluate", path)
    assert code == 2
    assert f"output_dir = {whole}: another process is writing its evaluation into it; wait for that one" in out
    assert contents(whole) == before
    assert run_command(root, "evaluate", path)[0] == 0


# Ranks, chunks, runs.


def evaluate_in_turn(configs: list[EvaluateConfig]) -> list[str]:
    """Every configuration on the same ranks; the text of the error that ended it, or nothing."""
    errors = []
    with contextlib.redirect_stdout(None):
        for config in configs:
            try:
                evaluate(config)
                errors.append("")
            except (ConfigError, RunError) as error:
                errors.append(f"{type(error).__name__}: {error}")
    return errors


@pytest.mark.distributed
def test_two_ranks_give_what_one_gives(root: Path, whole: Path) -> None:
    config = small_evaluation(root, "two_ranks")
    unfit = small_evaluation(root, "unfit", model=ModelConfig(path=unfit_model(root), dtype="float32"))
    errors = run_distributed(evaluate_in_turn, 2, [config, unfit])
    assert contents(config.output_dir) == contents(whole)
    # Every rank met it while it read the weights.
    assert errors[0] == errors[1]
    assert errors[0][0] == ""
    assert "its weights do not fit its config.json: the weight stream has" in errors[0][1]


def unfit_model(root: Path) -> Path:
    folder = root / "unfit_model"
    shutil.copytree(root / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    return folder


def test_an_export_gives_outside_what_the_run_gave_at_its_end(root: Path) -> None:
    """Read from the run's own file, in other chunks, and draw for draw the same."""
    fields = {"num_prompts": None, "samples_per_problem": SAMPLES, "temperature": 0.8}
    run = small_run(root, "run", data=prompts(root, held_out="held_out"), evaluation=fields)
    (ended,) = run_distributed(run_to_its_end, 1, run)
    assert ended.error == ()
    inside = run.output_dir / "evaluations" / "step_1"
    overrides = ["--model.path", str(run.output_dir / "export"), "--output_dir", str(root / "outside")]
    config = load_config(EvaluateConfig, run.output_dir / "config.yaml", overrides, RunConfig)
    run_distributed(evaluate_in_turn, 1, [replace(config, chunk_sequences=3 * SAMPLES)])
    for name in ("responses.jsonl", "problems.jsonl"):
        assert (root / "outside" / name).read_bytes() == (inside / name).read_bytes()
    outside = json.loads((root / "outside" / "evaluation.json").read_text())["metrics"]
    line = read_lines(run.output_dir / "metrics.jsonl")[-1]
    assert {key: value for key, value in line.items() if key.startswith("eval/")} == outside
    first = run.output_dir / "evaluations" / "step_0" / "responses.jsonl"
    assert len(read_lines(first)) == 8 * (SAMPLES + 1)
    table = evaluation_table(outside)
    for folder, lines in ((root / "outside", table), (run.output_dir, ["", "after step 1, by source:", *table])):
        shown = subprocess.run([sys.executable, SHOW, folder], capture_output=True, text=True, check=True).stdout
        assert shown.splitlines()[-len(lines) :] == lines
    assert shown.splitlines()[2].startswith("         0      0.")


# What is refused.


@pytest.fixture(scope="module")
def refusals(root: Path, whole: Path) -> dict[str, str]:
    taken = root / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    changes: dict[str, dict[str, Any]] = {
        "samples": {"evaluation": EvaluationConfig(samples_per_problem=8, pass_at=(2,), temperature=0.9, top_p=0.8)},
        "model": {"model": ModelConfig(path=root / "other_model", dtype="float32")},
        "output matrix": {"model": ModelConfig(path=root / "with_output_matrix", dtype="float32")},
        "prompts": {"data": held_out(root, "train")},
        "taken": {"output_dir": taken},
        "empty": {"output_dir": root / "new", "data": held_out(root, "empty")},
        "unanswered": {"output_dir": root / "new", "data": held_out(root, "unanswered")},
        "no judge": {"output_dir": root / "new", "reward": RewardConfig(terms={"correct": ReasoningGymTerm()})},
        "too many": {"output_dir": root / "new", "evaluation": EvaluationConfig(num_prompts=9)},
        "too long": {"output_dir": root / "new", "rollout": RolloutConfig(max_response_tokens=241)},
    }
    configs = [small_evaluation(root, "whole", **change) for change in changes.values()]
    before = contents(whole)
    (errors,) = run_distributed(evaluate_in_turn, 1, configs)
    assert contents(whole) == before
    assert not (root / "new").exists()
    return dict(zip(changes, errors, strict=True))


REFUSED = {
    "samples": "evaluation.samples_per_problem = 8: was 4 in the evaluation that {root}/whole holds, and results of "
    "both would mix; set it back to go on with that one, or choose another output_dir",
    "model": "model.path = content ",
    "output matrix": "model.path = {root}/with_output_matrix: has lm_head.weight with other bytes, though config.json",
    "prompts": "data.evaluation = content ",
    "taken": "output_dir = {root}/taken: must be a new or empty directory, and it is not",
    "empty": "data.evaluation.path = {root}/empty.jsonl: gives no usable prompt (it is empty)",
    "unanswered": "data.evaluation.path = {root}/unanswered.jsonl: gives no usable prompt (1 no_answer row (1)",
    "no judge": "reward.terms.correct.type = reasoning_gym: needs a reasoning-gym problem behind every prompt, and 8 "
    "of 8 in data.evaluation have none, held_out:1 first",
    "too many": "evaluation.num_prompts = 9: must not exceed the 8 usable prompts of data.evaluation",
    "too long": "rollout.max_response_tokens = 241: must not exceed, with data.max_prompt_tokens = 16, the model's 256 "
    "positions; shorten prompts or responses, or set model.context_length to 257 or more",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_evaluated_is_refused(kind: str, root: Path, refusals: dict[str, str]) -> None:
    assert refusals[kind].startswith("ConfigError: " + REFUSED[kind].format(root=root)), refusals[kind]


def test_the_command_tells_bad_input_in_one_line(root: Path) -> None:
    path = root / "bad.yaml"
    path.write_text(dump_config(small_evaluation(root, "bad")))
    code, out = run_command(root, "evaluate", path, "--evaluation.pass_at", "5")
    assert (code, out) == (
        2,
        "megatron-fipo: evaluation.pass_at = 5: must lie in [1, samples_per_problem = 4]; take more samples, or a "
        "smaller k\n",
    )
