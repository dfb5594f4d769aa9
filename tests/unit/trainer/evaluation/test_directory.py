"""A directory goes on with its own evaluation alone, also where that was killed while it made it."""

import json
from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import JsonlPrompts
from megatron_fipo.config.evaluate import EvaluateConfig, EvaluationData
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.reward import ExactMatchTerm, RewardConfig
from megatron_fipo.trainer.evaluation.directory import prepare_directory

INPUTS = {"model.path": "1" * 64, "data.evaluation": "2" * 64}


def evaluation(folder: Path, seed: int = 1) -> EvaluateConfig:
    return EvaluateConfig(
        output_dir=folder / "evaluation",
        model=ModelConfig(path=folder / "model"),
        data=EvaluationData(evaluation=JsonlPrompts(path=folder / "problems.jsonl")),
        reward=RewardConfig(terms={"correct": ExactMatchTerm()}),
        seed=seed,
    )


def test_a_directory_goes_on_with_its_own_evaluation_alone(tmp_path: Path) -> None:
    for _ in range(2):
        prepare_directory(evaluation(tmp_path), INPUTS)
    with pytest.raises(ConfigError, match="seed = 2: was 1 in the evaluation that"):
        prepare_directory(evaluation(tmp_path, seed=2), INPUTS)
    with pytest.raises(ConfigError, match="model.path = content 333333333333: had content 111111111111"):
        prepare_directory(evaluation(tmp_path), INPUTS | {"model.path": "3" * 64})


def test_a_directory_that_was_half_made_is_made_whole(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    prepare_directory(evaluation(tmp_path), INPUTS)
    (folder / "inputs.json").rename(folder / ".inputs.json.partial")
    # From ranks that saw the first one die.
    (folder / "last_breakdown").write_text("-1")
    (folder / "logs").mkdir()
    with pytest.raises(ConfigError, match="seed = 2: was 1"):
        prepare_directory(evaluation(tmp_path, seed=2), INPUTS)
    prepare_directory(evaluation(tmp_path), INPUTS)
    assert json.loads((folder / "inputs.json").read_text()) == INPUTS


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "evaluation" / name).touch()
    with pytest.raises(ConfigError, match="must be a new or empty directory"):
        prepare_directory(evaluation(tmp_path), INPUTS)
