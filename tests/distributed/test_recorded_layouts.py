"""One recorded rollout through the functions of a run, whole: sharing out, old log-probabilities, eight updates.

`test_layout_invariance.py` compares many more layouts, gradients and weights; here the batch comes from a recording and
goes the way that it goes in a run. Tolerances of the loss and of the gradient norm are those of docs/architecture.md,
contract 1, in float32. Metrics see the same weights up to float32 rounding: counts are equal, values to 1e-5; on the
first update, before rounding can move a weight, every metric but those of the log-probabilities themselves is equal bit
for bit. `test_metric_layouts.py` compares them where the log-probabilities are given.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.baselines import DapoConfig
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge_import import import_bridge
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.parallel.context import destroy_parallel_context
from megatron_fipo.rollout.batch import load_batch
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.trainer.build import build_run
from megatron_fipo.trainer.loop import (
    assemble_batch,
    compute_old_log_probs,
    distribute_batch,
    update_policy,
)
from tests.distributed_helpers import run_distributed
from tests.recorded_batches import record_batch
from tests.tiny_models import write_tiny_model

# Ranks are forked: what is imported before, none of them has to import for itself.
import_bridge()

UPDATES = 8
# The dual-clip bound is far below the usual 10, so that the drop rule fires.
FIPO = FipoConfig.preset("official-7b", aggregation="token_mean", dual_clip=1.25, safety_threshold=1.15)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "single, small packs": (1, {"max_tokens_per_micro_batch": 64}),
    "DP 2": (2, {}),
    "PP 2 × VPP 2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP 2 × CP 2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    ),
}

# Metrics that see rounding before the first update.
OF_LOG_PROBS = {
    "train/entropy",
    "train/mismatch_kl",
    "train/mismatch_kl_k3",
    "train/mismatch_max",
    "train/mismatch_mean_abs",
    "train/mismatch_mean_abs_from_0",
    "train/mismatch_mean_abs_from_lag_0",
}


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    grad_norms: list[float]
    denominators: list[int]
    metrics: list[dict[str, float]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("layouts")
    model = write_tiny_model(root / "model")
    record_batch(model, root / "recorded", FIPO, group_size=16)
    return model, root


def run_config(folders: tuple[Path, Path], output: str, parallelism: dict[str, Any], algorithm: Any) -> RunConfig:
    model, root = folders
    return RunConfig(
        output_dir=root / output,
        num_steps=1,
        mode="train_only",
        recorded_rollouts=root / "recorded",
        model=ModelConfig(path=model, dtype="float32"),
        algorithm=algorithm,
        rollout=RolloutConfig(num_prompts_per_step=8, group_size=16, max_response_tokens=40),
        parallelism=ParallelismConfig(**{"max_tokens_per_micro_batch": 384, **parallelism}),
        # A large eps: parameters whose true gradient is 0 must not be moved by its rounding.
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=0, adam_eps=1e-3, weight_decay=0.01),
        checkpoint=CheckpointConfig(export_at_end=False),
    )


def run_updates(configs: list[RunConfig]) -> list[Outcome]:
    """All updates of every configuration, one after the other on the same ranks."""
    quiet_upstream()
    outcomes = []
    for config in configs:
        run = build_run(config)
        batch = assemble_batch(run, 1, None)
        micro_batches = distribute_batch(run, batch)
        compute_old_log_probs(run, micro_batches)
        results = update_policy(run, 1, micro_batches, batch)
        outcomes.append(
            Outcome(
                losses=[result.loss for result in results],
                grad_norms=[result.grad_norm for result in results],
                denominators=[result.denominator for result in results],
                metrics=[result.metrics for result in results],
            )
        )
        destroy_parallel_context()
    return outcomes


def outcomes_of(folders: tuple[Path, Path], names: list[str], algorithm: Any, tag: str) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for world_size in sorted({LAYOUTS[name][0] for name in names}):
        here = [name for name in names if LAYOUTS[name][0] == world_size]
        configs = [run_config(folders, f"{tag} {name}".replace(" ", "_"), LAYOUTS[name][1], algorithm) for name in here]
        results = run_distributed(run_updates, world_size, configs)
        for rank, result in enumerate(results):
            assert result == results[0], f"rank {rank} reports other numbers than rank 0"
        outcomes |= dict(zip(here, results[0], strict=True))
    return outcomes


@pytest.fixture(scope="module")
def fipo_outcomes(folders: tuple[Path, Path]) -> dict[str, Outcome]:
    return outcomes_of(folders, list(LAYOUTS), FIPO, "fipo")


def test_recording_exercises_the_algorithm(folders: tuple[Path, Path], fipo_outcomes: dict[str, Outcome]) -> None:
    single = fipo_outcomes["single"]
    assert len(single.losses) == UPDATES
    assert single.metrics[0]["fipo/fraction_changed"] == 0.0, "on the first update the policy is the old one"
    assert min(metrics["fipo/fraction_changed"] for metrics in single.metrics[1:]) >= 0.2
    dropped = sum(metrics["fipo/dropped_sequences"] for metrics in single.metrics)
    assert 0 < dropped < 64, "some sequences are dropped, and not all"
    declared = [metric for section in CATALOGUE.sections for metric in section.metrics if metric.reduction != "rank 0"]
    of_updates = {metric.name for metric in declared if metric.combination not in ("step", "list", "first")}
    of_settings = {
        "train/rollout_importance_mean",
        "train/rollout_corrected_fraction",
        "train/reference_kl",
        "train/reference_kl_k3",
    }
    reported = {CATALOGUE.find(key)[0].name for key in single.metrics[-1]}
    assert of_updates - reported == of_settings, "each has a setting of its own"


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "single"])
def test_every_layout_gives_the_same_updates(
    folders: tuple[Path, Path], fipo_outcomes: dict[str, Outcome], name: str
) -> None:
    single, other = fipo_outcomes["single"], fipo_outcomes[name]
    assert other.denominators == single.denominators
    drops = "fipo/dropped_sequences"
    assert [metrics[drops] for metrics in other.metrics] == [metrics[drops] for metrics in single.metrics]
    mean_advantage = np.abs(load_batch(folders[1] / "recorded" / "rollout_000001.npz").advantages).mean()
    loss_error = np.abs(np.subtract(other.losses, single.losses)).max() / mean_advantage
    norm_error = np.abs(np.divide(other.grad_norms, single.grad_norms) - 1).max()
    print(f"{name}: loss {loss_error:.2e} · mean|A|, gradient norm {norm_error:.2e}")
    assert loss_error <= 1e-6
    assert norm_error <= 1e-6
    for number, (mine, theirs) in enumerate(zip(other.metrics, single.metrics, strict=True)):
        assert mine.keys() == theirs.keys()
        different = {key for key, value in theirs.items() if mine[key] != value}
        counts = {key for key in theirs if CATALOGUE.find(key)[0].reduction == "sum"}
        assert not different & counts, f"update {number + 1}"
        if number == 0:
            assert different <= OF_LOG_PROBS
        for key in different:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), f"update {number + 1}: {key}"


@pytest.mark.distributed
def test_repeating_a_run_is_bitwise_equal(folders: tuple[Path, Path], fipo_outcomes: dict[str, Outcome]) -> None:
    again = outcomes_of(folders, ["TP 2 × CP 2"], FIPO, "again")
    assert again["TP 2 × CP 2"] == fipo_outcomes["TP 2 × CP 2"]


def test_dapo_has_no_influence(folders: tuple[Path, Path], fipo_outcomes: dict[str, Outcome]) -> None:
    dapo = outcomes_of(folders, ["single"], DapoConfig(dual_clip=1.3), "dapo")["single"]
    fipo = fipo_outcomes["single"]
    assert dapo.losses[0] == fipo.losses[0], "on the first update FIPO is DAPO"
    assert dapo.losses[1:] != fipo.losses[1:]
