"""What a whole run logs: declared names alone, the same in every sink, over all ranks."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fipo.config.metrics import WandbConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import UPDATES, read_lines, run_in_turn, small_run, without_times, write_inputs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run with every sink, and without quantiles."""
    root = write_inputs(tmp_path_factory.mktemp("metrics"))
    sinks = {"tensorboard": True, "prometheus_port": 0, "wandb": WandbConfig(mode="offline")}
    configs = [
        small_run(root, "every sink", metrics=sinks),
        small_run(root, "no quantiles", metrics={"quantiles": False}),
    ]
    for ends in run_distributed(run_in_turn, 2, configs):
        for ended in ends:
            assert ended.error == ()
            assert ended.log == [], "no metric is undeclared and no sink failed"
    return {config.output_dir.name: config.output_dir for config in configs}


@pytest.fixture(scope="module")
def run_directory(run_directories: dict[str, Path]) -> Path:
    return run_directories["every sink"]


def test_a_step_has_the_metrics_that_are_declared(run_directory: Path) -> None:
    line = read_lines(run_directory / "metrics.jsonl")[1]
    assert not CATALOGUE.undeclared(line)
    families = {CATALOGUE.find(key)[0].name for key in line}
    declared = {metric.name for section in CATALOGUE.sections for metric in section.metrics}
    elsewhere = ("eval/", "data/", "rollout/", "reward/", "perf/weight_sync", "perf/offload", "perf/journal")
    absent = {name for name in declared - families if not name.startswith(elsewhere)}
    of_settings = {
        "train/rollout_importance_mean",
        "train/rollout_corrected_fraction",
        "train/routing_mismatch_fraction",
        "train/reference_kl",
        "train/reference_kl_k3",
    }
    assert absent == of_settings, "they have settings of their own"
    assert {"rollout/accuracy", "rollout/truncated_fraction", "rollout/response_length_p95"} <= set(line)
    assert len(line["train/loss_by_update"]) == UPDATES


def test_memory_and_speed_are_measured(run_directory: Path) -> None:
    line = read_lines(run_directory / "metrics.jsonl")[1]
    # The kernel keeps the two counters apart, to within some pages.
    assert 0.05 < line["perf/host_memory_gib"] <= 1.01 * line["perf/peak_memory_gib"] < 64
    for phase, key in (("old_log_probs", "perf/old_log_probs_tokens_per_s"), ("update", "perf/update_tokens_per_s")):
        tokens = line[key] * line[f"time/{phase}_s"]
        lengths = line["rollout/response_length_mean"] + line["rollout/prompt_length_mean"]
        assert tokens == pytest.approx(lengths * line["rollout/num_sequences"])


def test_sinks_have_what_metrics_jsonl_has(run_directory: Path) -> None:
    events = EventAccumulator(str(run_directory / "tensorboard")).Reload()
    shown: dict[int, dict[str, float]] = {}
    for key in events.Tags()["scalars"]:
        for point in events.Scalars(key):
            shown.setdefault(point.step, {})[key] = point.value
    for line in read_lines(run_directory / "metrics.jsonl"):
        values = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
        assert shown[line["step"]] == pytest.approx(values, rel=1e-6)
    assert list((run_directory / "wandb").glob("offline-run-*/*.wandb"))


def test_quantiles_can_be_left_out(run_directories: dict[str, Path]) -> None:
    (*_, whole), (*_, without) = (
        without_times(read_lines(run_directories[name] / "metrics.jsonl")) for name in ("every sink", "no quantiles")
    )
    quantiles = {key for key in whole if CATALOGUE.find(key)[0].reduction == "quantile"}
    assert len(quantiles) == 20
    assert without == {key: value for key, value in whole.items() if key not in quantiles}
