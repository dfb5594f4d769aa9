"""Whole runs of a tiny random model, small enough to take seconds."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.data import DataConfig, JsonlPrompts
from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.config.metrics import MetricsConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.reward import ExactMatchTerm, RewardConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.watchdog import WatchdogConfig
from megatron_fipo.parallel.context import destroy_parallel_context
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.trainer.build import build_run
from megatron_fipo.trainer.loop import train
from tests.tiny_models import write_tiny_model

# A random model's bytes are hardly ever UTF-8, so a response ends in the replacement character about every other time.
LIKELY_ANSWER = "\ufffd"
ANSWER_PATTERN = r"(\S)\s*\Z"
UPDATES = 2


def write_inputs(root: Path) -> Path:
    """A model folder and two prompt files, one whose answers are often met and one whose answers never are."""
    write_tiny_model(root / "model")
    for name, answer in (("train", LIKELY_ANSWER), ("hopeless", "never")):
        rows = [{"prompt": f"{number}+{number}=", "answer": answer} for number in range(20)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"prompt": f"{number}-1=", "answer": LIKELY_ANSWER} for number in range(8)]
    (root / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return root


def small_run(root: Path, name: str, **changes: Any) -> RunConfig:
    """A configuration over the inputs in `root`; sections may be given as they are or as mappings of their fields."""
    sections: dict[str, Any] = {
        "model": {"path": root / "model", "dtype": "float32"},
        "algorithm": {"updates_per_rollout": UPDATES},
        "reward": {"terms": {"correct": ExactMatchTerm(answer_pattern=ANSWER_PATTERN)}, "require_stop": False},
        "rollout": {"num_prompts_per_step": 4, "group_size": 4, "max_response_tokens": 12, "max_generation_rounds": 3},
        "parallelism": {"max_tokens_per_micro_batch": 64},
        # A large eps: parameters whose true gradient is 0 must not be moved by its rounding.
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "adam_eps": 1e-4},
        "evaluation": {"num_prompts": 8},
        "checkpoint": {"export_dtype": "float32"},
        "metrics": {"samples_per_step": 3},
        "watchdog": {},
    }
    classes = {
        "model": ModelConfig,
        "algorithm": FipoConfig,
        "reward": RewardConfig,
        "rollout": RolloutConfig,
        "parallelism": ParallelismConfig,
        "optimizer": OptimizerConfig,
        "evaluation": EvaluationConfig,
        "checkpoint": CheckpointConfig,
        "metrics": MetricsConfig,
        "watchdog": WatchdogConfig,
    }
    values: dict[str, Any] = {"output_dir": root / name, "num_steps": 1, "data": prompts(root)} | changes
    for section, fields in sections.items():
        given = values.get(section, {})
        if isinstance(given, dict):
            values[section] = classes[section](**(fields | given))
    return RunConfig(**values)


def prompts(root: Path, train: str = "train", held_out: str | None = None, name: str | None = None) -> DataConfig:
    return DataConfig(
        train=JsonlPrompts(path=root / f"{train}.jsonl", name=name),
        evaluation=None if held_out is None else JsonlPrompts(path=root / f"{held_out}.jsonl"),
        prompt_format="raw",
        max_prompt_tokens=16,
    )


@dataclass
class Ended:
    """How a run ended on one rank.

    Attributes:
        error: Class name and text of the error that ended it, or empty.
        log: Messages of the package's own warnings.
    """

    error: tuple[str, str] | tuple[()] = ()
    log: list[str] = field(default_factory=list)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def run_in_turn(configs: list[RunConfig]) -> list[Ended]:
    """Run every configuration, one after the other on the same ranks."""
    quiet_upstream()
    return [run_to_its_end(config) for config in configs]


def run_to_its_end(config: RunConfig, change: Any = None, progress: Progress = NO_PROGRESS) -> Ended:
    """Build and train; `change` is called with the run before it trains, `progress` watches it on rank 0."""
    messages = _Messages()
    logger = logging.getLogger("megatron_fipo")
    logger.setLevel(logging.WARNING)
    logger.addHandler(messages)
    ended = Ended(log=messages.texts)
    try:
        run = build_run(config, progress)
        if change is not None:
            change(run)
        train(run)
    except (ConfigError, RunError) as error:
        ended.error = (type(error).__name__, str(error))
    finally:
        logger.removeHandler(messages)
        destroy_parallel_context()
    return ended


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that a repeated run must give again."""
    return [{key: value for key, value in line.items() if not key.startswith(("time/", "perf/"))} for line in lines]
