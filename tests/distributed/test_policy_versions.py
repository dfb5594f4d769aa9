"""Responses sampled by several versions of the policy: `old` is the trainer's weights for all of their tokens."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep, UpdateResult
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig
from megatron_fipo.platform.device import compute_device
from megatron_fipo.rollout.batch import build_train_batch
from megatron_fipo.types import Prompt, RolloutGroup, Sample, TrainBatch
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import TinyActor, tiny_actor
from tests.tiny_models import VOCAB_SIZE, write_tiny_model

pytestmark = pytest.mark.distributed

FIPO = FipoConfig.preset("official-7b", aggregation="token_mean", updates_per_rollout=2)
CAP = 1.5
LENGTHS = (14, 20, 9, 17)


def rollout(log_probs: list[np.ndarray], versions: int = 1) -> TrainBatch:
    """Two groups of two samples, always the same tokens, under the given log-probabilities of the engine.

    With two versions the second half of each response is of version 1, the rest of version 0.
    """
    draws = np.random.default_rng(0)
    groups = []
    for number in range(2):
        prompt = Prompt(id=f"p{number}", token_ids=draws.integers(0, VOCAB_SIZE, 5).astype(np.int32), text="")
        samples = [
            Sample(
                prompt_id=prompt.id,
                sample_index=index,
                response_token_ids=draws.integers(0, VOCAB_SIZE, LENGTHS[2 * number + index]).astype(np.int32),
                rollout_log_probs=log_probs[2 * number + index].astype(np.float32),
                finish_reason="stop",
                policy_version=0,
                policy_versions=halves(LENGTHS[2 * number + index]) if versions == 2 else None,
                reward=float(index),
            )
            for index in range(2)
        ]
        groups.append(RolloutGroup(prompt=prompt, samples=samples))
    return build_train_batch(groups, FIPO, temperature=1.0)


def halves(length: int) -> np.ndarray:
    return (np.arange(length) >= length // 2).astype(np.int32)


def scored(actor: TinyActor, batch: TrainBatch) -> tuple[list[list[MicroBatch]], list[np.ndarray]]:
    """Micro-batches with the actor's present weights as `old`, and its log-probabilities of every response."""
    rules = packing_rules(actor.parallelism)
    mini_batches = shard_micro_batches(batch, rules, actor.context, compute_device())
    responses: list[np.ndarray] = [np.zeros(0)] * batch.num_sequences
    for mini_batch in mini_batches:
        for micro_batch, scores in zip(mini_batch, actor.forward.log_probs(mini_batch), strict=True):
            micro_batch.old_log_probs = scores
            for place, index in enumerate(micro_batch.sequences):
                # A token's log-probability lies where it is predicted, one position earlier.
                first = int(micro_batch.layout.cu_seqlens[place]) - 1
                span = slice(first + int(batch.prompt_lengths[index]), first + int(batch.sequence_lengths[index]))
                responses[index] = scores[span].numpy().copy()
    return mini_batches, responses


@dataclass(frozen=True)
class Outcome:
    results: list[UpdateResult]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Rollouts:
    """The updates of one rollout, and the engine's and the trainer's log-probabilities of its tokens."""

    outcome: Outcome
    engine: np.ndarray
    trainer: np.ndarray


def train(root: Path, versions: int, config: FipoConfig) -> Rollouts:
    """Train on a rollout that the engine sampled with the weights of the last one or two versions."""
    with tiny_actor(root, {"max_tokens_per_micro_batch": 32}) as actor:
        optimizer = ActorOptimizer(actor.chunks, OptimizerConfig(learning_rate=5e-3, warmup_steps=0), False)
        train_step = TrainStep(actor.forward, optimizer, config, actor.context)
        first, older = scored(actor, rollout([np.zeros(length) for length in LENGTHS]))
        for mini_batch in first:
            train_step.update(mini_batch)
        _, newer = scored(actor, rollout(older))
        engine = newer
        if versions == 2:
            engine = [np.r_[a[: len(a) // 2], b[len(a) // 2 :]] for a, b in zip(older, newer, strict=True)]
        second, trainer = scored(actor, rollout(engine, versions))
        results = [train_step.update(mini_batch, versions - 1) for mini_batch in second]
        weights = {name: tensor.clone() for name, tensor in actor.bridge.export(unwrap(actor.chunks))}
        return Rollouts(Outcome(results, weights), np.concatenate(engine), np.concatenate(trainer))


def train_all(root: Path) -> dict[str, Rollouts]:
    capped = replace(FIPO, rollout_correction=RolloutCorrectionConfig(kind="truncate", high=CAP))
    return {
        "one version": train(root, 1, FIPO),
        "two versions": train(root, 2, FIPO),
        "two versions, capped": train(root, 2, capped),
    }


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rollouts]:
    root = tmp_path_factory.mktemp("policy_versions")
    write_tiny_model(root, "qwen2")
    return run_distributed(train_all, 1, root)[0]


def test_the_trainers_weights_are_old_for_tokens_of_every_version(rollouts: dict[str, Rollouts]) -> None:
    one, two = rollouts["one version"], rollouts["two versions"]
    assert np.array_equal(one.trainer, two.trainer)
    assert np.abs(two.engine - two.trainer).max() > 0.01, "the versions must differ"
    assert two.outcome.results[1].metrics["fipo/fraction_changed"] > 0.1, "the weights must act"
    for name, weight in one.outcome.weights.items():
        assert weight.equal(two.outcome.weights[name]), name
    for mine, other in zip(one.outcome.results, two.outcome.results, strict=True):
        assert (mine.loss, mine.grad_norm) == (other.loss, other.grad_norm)
        changed = {key for key, value in mine.metrics.items() if other.metrics[key] != value}
        assert changed and all(key.startswith("train/mismatch_") for key in changed)


def test_the_first_update_is_null_whichever_version_sampled(rollouts: dict[str, Rollouts]) -> None:
    first = rollouts["two versions"].outcome.results[0].metrics
    assert (first["fipo/future_kl_square_mean"], first["fipo/fraction_changed"]) == (0.0, 0.0)


def test_mismatch_sees_the_versions(rollouts: dict[str, Rollouts]) -> None:
    one, two = rollouts["one version"], rollouts["two versions"]
    assert max(result.metrics["train/mismatch_max"] for result in one.outcome.results) < 1e-6
    expected = np.abs(two.engine.astype(np.float32) - two.trainer).max()
    assert max(result.metrics["train/mismatch_max"] for result in two.outcome.results) == pytest.approx(expected)


def test_mismatch_is_told_by_version(rollouts: dict[str, Rollouts]) -> None:
    one, two = rollouts["one version"], rollouts["two versions"]
    for number, result in enumerate(two.outcome.results):
        tokens = slice(sum(LENGTHS[: 2 * number]), sum(LENGTHS[: 2 * number + 2]))
        is_old = np.concatenate([halves(length) for length in LENGTHS])[tokens] == 0
        sizes = np.abs(two.engine.astype(np.float32) - two.trainer)[tokens]
        by_lag = [result.metrics[f"train/mismatch_mean_abs_from_lag_{lag}"] for lag in (0, 1)]
        assert by_lag == [pytest.approx(sizes[~is_old].mean()), pytest.approx(sizes[is_old].mean())]
        assert by_lag[0] < 1e-6 < 1e-3 < by_lag[1]
        assert "train/mismatch_mean_abs_from_lag_2" not in result.metrics
    assert all("train/mismatch_mean_abs_from_lag_1" not in result.metrics for result in one.outcome.results)


def test_the_truncated_importance_factor_corrects_the_loss_and_not_the_future_kl(rollouts: dict[str, Rollouts]) -> None:
    plain, capped = rollouts["two versions"], rollouts["two versions, capped"]
    first, first_capped = plain.outcome.results[0], capped.outcome.results[0]
    assert first_capped.loss != first.loss
    assert first_capped.metrics["fipo/future_kl_square_mean"] == 0.0
    # The first update has the first group, on whose tokens the factor is min(π_old / π_engine, cap).
    tokens = slice(0, LENGTHS[0] + LENGTHS[1])
    factor = np.minimum(np.exp(capped.trainer - capped.engine.astype(np.float32))[tokens], CAP)
    assert first_capped.metrics["train/rollout_importance_mean"] == pytest.approx(factor.mean(), rel=1e-6)
    assert not np.allclose(factor, 1)
