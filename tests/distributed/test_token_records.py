"""Token records of one rollout under several ways of cutting the model: the same tokens and numbers."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.metrics import MetricsConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge_import import import_bridge
from megatron_fipo.display.token_file import TokenRecords, load_tokens, token_path
from megatron_fipo.parallel.context import destroy_parallel_context
from megatron_fipo.rollout.batch import load_batch, load_recorded, save_batch
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.trainer.build import build_run
from megatron_fipo.trainer.loop import train
from tests.distributed_helpers import run_distributed
from tests.recorded_batches import record_batch
from tests.tiny_models import VOCAB_SIZE, write_tiny_model

# Ranks are forked: what is imported before, none of them has to import for itself.
import_bridge()

SAMPLES = 5
# The dual-clip bound is far below the usual 10, so that the drop rule fires.
FIPO = FipoConfig.preset("official-7b", aggregation="token_mean", dual_clip=1.1, safety_threshold=1.05)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "none": (1, {}),
    "DP 2, small packs": (2, {"max_tokens_per_micro_batch": 64}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
    "TP 2 × CP 2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    root = tmp_path_factory.mktemp("tokens")
    model = write_tiny_model(root / "model")
    path = record_batch(model, root / "recorded", FIPO)
    # Every group's first sample has reward 1 there; sequences are dropped for the tokens that go up against a bad one.
    batch = load_batch(path)
    save_batch(dataclasses.replace(batch, rewards=1 - batch.rewards), path)
    return {
        name: RunConfig(
            output_dir=root / name.replace(" ", "_").replace(",", ""),
            num_steps=1,
            mode="train_only",
            recorded_rollouts=root / "recorded",
            model=ModelConfig(path=model, dtype="float32"),
            algorithm=FIPO,
            rollout=RolloutConfig(num_prompts_per_step=8, group_size=4, max_response_tokens=40),
            parallelism=ParallelismConfig(**{"max_tokens_per_micro_batch": 384, **LAYOUTS[name][1]}),
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=0, adam_eps=1e-3, weight_decay=0.01),
            checkpoint=CheckpointConfig(export_at_end=False),
            metrics=MetricsConfig(samples_per_step=0 if name == "none" else SAMPLES),
        )
        for name in LAYOUTS
    }


def train_in_turn(configs: list[RunConfig]) -> None:
    quiet_upstream()
    for config in configs:
        train(build_run(config))
        destroy_parallel_context()


@pytest.fixture(scope="module")
def records(configs: dict[str, RunConfig]) -> dict[str, TokenRecords]:
    for size in (1, 2, 4):
        run_distributed(train_in_turn, size, [config for name, config in configs.items() if LAYOUTS[name][0] == size])
    return {name: load_tokens(token_path(configs[name].output_dir, 1)) for name in LAYOUTS if name != "none"}


def test_nothing_is_recorded_where_no_sample_is_kept(
    configs: dict[str, RunConfig], records: dict[str, TokenRecords]
) -> None:
    assert (configs["none"].output_dir / "metrics.jsonl").is_file()
    assert not (configs["none"].output_dir / "tokens").exists()


def test_records_are_of_the_chosen_responses(configs: dict[str, RunConfig], records: dict[str, TokenRecords]) -> None:
    single = records["single"]
    batch = load_recorded(
        configs["single"].output_dir.parent / "recorded" / "rollout_000001.npz", configs["single"], VOCAB_SIZE
    )
    assert single.sequences.tolist() == [4 * group for group in (0, 2, 4, 5, 7)]
    assert single.updates.tolist() == (batch.mini_batch_ids[single.sequences] + 1).tolist()
    assert (single.advantages == batch.advantages[single.sequences]).all()
    assert single.pieces is None
    for number, sequence in enumerate(single.sequences):
        tokens = slice(single.starts[number], single.starts[number + 1])
        start, end = batch.sequence_starts[sequence : sequence + 2]
        prompt = batch.prompt_lengths[sequence]
        assert (single.token_ids[tokens] == batch.token_ids[start + prompt : end]).all()
        assert single.places[tokens].tolist() == list(range(end - start - prompt))


def test_records_show_the_algorithm_at_work(records: dict[str, TokenRecords]) -> None:
    single = records["single"]
    first = slice(single.starts[0], single.starts[1])
    assert single.updates[0] == 1
    for name, value in (("log_ratio", 0.0), ("future_kl", 0.0), ("influence_weights", 1.0)):
        assert (getattr(single, name)[first] == value).all(), "on the first update the policy is the old one"
    assert single.kept[first].all()
    later = slice(single.starts[1], None)
    assert np.abs(single.log_ratio[later]).max() > 0.01
    weights = single.influence_weights[later]
    assert FIPO.influence_clip_low <= weights.min() < 1 < weights.max() <= FIPO.influence_clip_high
    assert not single.kept.all(), "a dropped sequence is recorded too"
    assert (single.old_log_probs < 0).all()
    assert (single.entropy > 0).all()


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("single", "none")])
def test_every_layout_records_the_same(records: dict[str, TokenRecords], name: str) -> None:
    single, other = records["single"], records[name]
    for field in ("sequences", "updates", "advantages", "starts", "token_ids", "places", "kept"):
        assert (getattr(other, field) == getattr(single, field)).all(), field
    for field in ("old_log_probs", "log_ratio", "future_kl", "influence_weights", "entropy"):
        np.testing.assert_allclose(getattr(other, field), getattr(single, field), rtol=1e-4, atol=2e-6, err_msg=field)
