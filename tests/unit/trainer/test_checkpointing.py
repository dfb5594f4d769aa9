"""The metric that ranks checkpoints."""

import json
from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.trainer import checkpointing
from megatron_fipo.trainer.checkpointing import check_best_metric, read_score


def test_a_score_is_the_steps_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "eval/average": 0.25},
        {"step": 2, "eval/average": None, "train/loss": 1},
        {"step": 3, "eval/average": 0.5},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval/av')
    assert read_score(path, 3, "eval/average") == 0.5
    assert read_score(path, 1, "eval/average") == 0.25
    assert read_score(path, 2, "eval/average") is None
    assert read_score(path, 2, "train/loss") == 1.0
    assert read_score(path, 4, "eval/average") is None


def test_a_metric_that_no_step_has_ranks_nothing() -> None:
    for name in ("eval/accuracy", "eval/aime/avg_at_8", "rollout/reward_mean"):
        check_best_metric(CheckpointConfig(keep_best=1, best_metric=name))
    check_best_metric(CheckpointConfig())
    with pytest.raises(ConfigError, match="checkpoint.best_metric = eval/acuracy: must be a metric, and no step has"):
        check_best_metric(CheckpointConfig(keep_best=1, best_metric="eval/acuracy"))


def test_the_end_of_a_long_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "a": step}) + "\n" for step in range(1000)))
    monkeypatch.setattr(checkpointing, "_TAIL_BYTES", 200)
    assert read_score(path, 999, "a") == 999.0
    assert read_score(path, 1, "a") is None
