"""A run with a reference-KL term: its distance from the initial policy grows from exactly 0, and the term holds it."""

from typing import Any

import pytest

from megatron_fipo.config.baselines import DapoConfig
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import read_lines, run_in_turn, small_run, without_times, write_inputs

pytestmark = pytest.mark.distributed

KL = "train/reference_kl_k3"
Lines = list[dict[str, Any]]
ALGORITHMS = {
    "without": DapoConfig(updates_per_rollout=1),
    "unheld": DapoConfig(updates_per_rollout=1, reference_kl_coefficient=1e-12),
    "held": DapoConfig(updates_per_rollout=1, reference_kl_coefficient=10.0, reference_kl_estimator="k2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lines]:
    """The lines of three steps by run, all on the same recorded rollouts and on two tensor-parallel ranks."""
    root = write_inputs(tmp_path_factory.mktemp("reference"))
    common = {"num_steps": 3, "parallelism": {"tensor_model_parallel_size": 2}, "optimizer": {"learning_rate": 3e-3}}
    recording = small_run(root, "recording", mode="rollout_only", algorithm=ALGORITHMS["without"], **common)
    replay = common | {"mode": "train_only", "recorded_rollouts": recording.output_dir / "rollouts", "data": None}
    configs = {name: small_run(root, name, algorithm=algorithm, **replay) for name, algorithm in ALGORITHMS.items()}
    for ends in run_distributed(run_in_turn, 2, [recording, *configs.values()]):
        assert [(ended.error, ended.log) for ended in ends] == [((), [])] * 4
    lines = {name: read_lines(config.output_dir / "metrics.jsonl") for name, config in configs.items()}
    return {name: [line for line in of_run if line["step"]] for name, of_run in lines.items()}


def test_the_distance_grows_from_zero(runs: dict[str, Lines]) -> None:
    first, second, third = runs["unheld"]
    assert first["train/reference_kl"] == first[KL] == 0.0
    assert 0 < second[KL] < third[KL]
    assert all(line["time/reference_s"] > 0 for line in runs["unheld"])


def test_the_term_holds_the_policy_near(runs: dict[str, Lines]) -> None:
    assert runs["held"][0]["train/loss"] == runs["unheld"][0]["train/loss"]
    assert runs["held"][1][KL] == runs["unheld"][1][KL], "without a distance there is no pull"
    assert runs["held"][2][KL] < 0.6 * runs["unheld"][2][KL]


def test_the_reference_pass_itself_changes_nothing(runs: dict[str, Lines]) -> None:
    """Lines are compared to ten digits: a coefficient of 1e-12 is not quite 0."""
    for line, plain in zip(without_times(runs["unheld"]), without_times(runs["without"]), strict=True):
        assert {key for key in line if key not in plain} == {"train/reference_kl", KL}
        for key, value in plain.items():
            assert line[key] == pytest.approx(value, rel=1e-10), key
    assert not any(key.startswith("time/reference") for line in runs["without"] for key in line)
