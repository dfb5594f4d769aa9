"""A run with a reference-KL term: its distance from the initial policy grows from exactly 0, and the term holds it."""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import read_lines, run_in_turn, small_run, without_times, write_inputs

pytestmark = pytest.mark.distributed

KL = "train/reference_kl_k3"
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "without": DapoConfig(updates_per_rollout=1),
    "unheld": DapoConfig(updates_per_rollout=1, reference_kl_coefficient=1e-12),
    "held": DapoConfig(updates_per_rollout=1, reference_kl_coefficient=10.0, reference_kl_estimator="k2"),
    "fipo": FipoConfig.preset("paper-v2", updates_per_rollout=2, reference_kl_coefficient=0.01),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The lines of every step, by run; each on two tensor-parallel ranks."""
    root = write_inputs(tmp_path_factory.mktemp("reference"))
    configs = [
        small_run(
            root,
            name,
            algorithm=algorithm,
            num_steps=3,
            parallelism={"tensor_model_parallel_size": 2},
            optimizer={"learning_rate": 3e-3},
        )
        for name, algorithm in ALGORITHMS.items()
    ]
    for ends in run_distributed(run_in_turn, 2, configs):
        assert [(ended.error, ended.log) for ended in ends] == [((), [])] * len(configs)
    return {config.output_dir.name: read_lines(Path(config.output_dir) / "metrics.jsonl")[1:] for config in configs}


def test_the_distance_grows_from_zero(runs: dict[str, list[dict[str, Any]]]) -> None:
    first, second, third = runs["unheld"]
    assert first["train/reference_kl"] == first[KL] == 0.0
    assert 0 < second[KL] < third[KL]
    # With a second update, the first step has already moved.
    assert 0 < runs["fipo"][0][KL] < runs["fipo"][1][KL]
    assert all(line["time/reference_s"] > 0 for line in runs["unheld"])


def test_the_term_holds_the_policy_near(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert runs["held"][0]["train/loss"] == runs["unheld"][0]["train/loss"]
    assert runs["held"][2][KL] < 0.6 * runs["unheld"][2][KL]


def test_the_reference_pass_itself_changes_nothing(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Lines are compared to ten digits: a coefficient of 1e-12 is not quite 0."""
    for line, plain in zip(without_times(runs["unheld"]), without_times(runs["without"]), strict=True):
        assert {key for key in line if key not in plain} == {"train/reference_kl", KL}
        for key, value in plain.items():
            assert line[key] == pytest.approx(value, rel=1e-10), key
    assert not any(key.startswith("time/reference") for line in runs["without"] for key in line)
