"""One optimizer step: the same under every setting that promises it, and refused without a trace where it must be.

Tolerances in float32 are those of contract 1: losses within 1e-6 of the mean |advantage|, gradient norms within 1e-6,
weights ‖a − b‖ ≤ 1e-6 · max(‖b‖, 1) per tensor.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep, UpdateResult
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.baselines import DapoConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import PER_TOKEN_FIELDS, TrainBatch
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import TinyActor, bits, random_batch, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

# The dual-clip bound is far below the usual 10, so that the drop rule can be reached.
FIPO = FipoConfig.preset("official-7b", aggregation="token_mean", dual_clip=1.25, safety_threshold=1.15)
# A large eps: parameters whose true gradient is 0 must not be moved by its rounding.
OPTIMIZER = OptimizerConfig(learning_rate=5e-4, warmup_steps=0, adam_eps=1e-3, weight_decay=0.01)


def three_updates() -> TrainBatch:
    """A single long sequence, for which one of two replicas gets a null micro-batch, then sixteen, and sixteen."""
    batch = random_batch([64, *np.random.default_rng(1).integers(4, 41, 32).tolist()])
    return replace(batch, mini_batch_ids=np.array([0] + [1] * 16 + [2] * 16, dtype=np.int32))


BATCH = three_updates()


@dataclass(frozen=True)
class Setting:
    """How to run the updates of BATCH; the rest is the default."""

    architecture: str = "qwen2"
    parallelism: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
FULL = {"activation_recompute": "full"}

SETTINGS: dict[int, dict[str, Setting]] = {
    1: {
        "qwen2": Setting(),
        "qwen3": Setting("qwen3"),
        "qwen3_moe": Setting("qwen3_moe"),
        "qwen2, full recomputation": Setting(parallelism=FULL),
        "qwen2, selective recomputation": Setting(parallelism={"activation_recompute": "selective"}),
        "qwen2, logits computed again": Setting(model={"recompute_logits": True, "log_prob_chunk_tokens": 7}),
        "qwen2, whole optimizer": Setting(parallelism={"use_distributed_optimizer": False}),
        "qwen2, bfloat16": Setting(model={"dtype": "bfloat16"}),
    },
    2: {
        "qwen2, DP 2": Setting(),
        "qwen2, DP 2, whole optimizer": Setting(parallelism={"use_distributed_optimizer": False}),
        "qwen2, DP 2, overlapped": Setting(parallelism={"overlap_grad_reduce": True}),
        "qwen2, DP 2, overlapped, whole optimizer": Setting(
            parallelism={"overlap_grad_reduce": True, "use_distributed_optimizer": False}
        ),
        "qwen2, PP 2": Setting(parallelism=PP),
        "qwen2, PP 2 × VPP 2, full recomputation": Setting(parallelism=VPP | FULL),
        "qwen3, TP 2": Setting("qwen3", TP),
        "qwen3, TP 2 + SP": Setting("qwen3", SP),
        "qwen3, CP 2": Setting("qwen3", {"context_parallel_size": 2}),
        "qwen3_moe, EP 2": Setting("qwen3_moe", EP),
        "qwen3_moe, TP 2 + SP × EP 2": Setting("qwen3_moe", SP | EP),
        "qwen3_moe, PP 2, full recomputation": Setting("qwen3_moe", PP | FULL),
        "qwen2, DP 2, bfloat16": Setting(model={"dtype": "bfloat16"}),
        "qwen2, TP 2 + SP, bfloat16": Setting(parallelism=SP, model={"dtype": "bfloat16"}),
    },
}


@dataclass(frozen=True)
class Outcome:
    results: list[UpdateResult]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train_step")
    for architecture in ("qwen2", "qwen3", "qwen3_moe"):
        write_tiny_model(root / architecture, architecture)
    return root


def prepare(
    actor: TinyActor, batch: TrainBatch, algorithm: FipoConfig | DapoConfig = FIPO
) -> tuple[TrainStep, list[list[MicroBatch]]]:
    """What runs the updates, and the micro-batches of each with their old log-probabilities."""
    optimizer = ActorOptimizer(actor.chunks, OPTIMIZER, actor.provider.bf16)
    train_step = TrainStep(actor.forward, optimizer, algorithm, actor.context)
    micro_batches = shard_micro_batches(
        batch if actor.context.rank == 0 else None, packing_rules(actor.parallelism), actor.context, compute_device()
    )
    for mini_batch in micro_batches:
        scores = actor.forward.log_probs(mini_batch)
        for micro_batch, log_probs in zip(mini_batch, scores, strict=False):
            micro_batch.old_log_probs = log_probs
    return train_step, micro_batches


def exported(actor: TinyActor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in actor.bridge.export(unwrap(actor.chunks))}


def run_settings(root: Path, settings: dict[str, Setting]) -> dict[str, Outcome]:
    # Memory that was never written reads as NaN.
    torch.use_deterministic_algorithms(True)
    outcomes = {}
    for name, setting in settings.items():
        parallelism = {"max_tokens_per_micro_batch": 64, **setting.parallelism}
        with tiny_actor(root / setting.architecture, parallelism, **setting.model) as actor:
            train_step, micro_batches = prepare(actor, BATCH)
            results = [train_step.update(mini_batch) for mini_batch in micro_batches]
            weights = exported(actor)
            outcomes[name] = Outcome(results, weights if actor.context.rank == 0 else {})
    return outcomes


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for world_size, settings in SETTINGS.items():
        ranks = run_distributed(run_settings, world_size, root, settings)
        for name in settings:
            for rank in ranks[1:]:
                assert rank[name].results == ranks[0][name].results, f"{name}: ranks report different numbers"
        found |= ranks[0]
    return found


FLOAT32 = [
    (name, setting.architecture)
    for settings in SETTINGS.values()
    for name, setting in settings.items()
    if name != setting.architecture and "bfloat16" not in name
]


def relative(actual: list[float], expected: list[float]) -> float:
    return float(np.abs(np.divide(actual, expected) - 1).max())


@pytest.mark.parametrize(("name", "baseline"), FLOAT32)
def test_settings_change_no_number(outcomes, name, baseline):
    mine, single = outcomes[name], outcomes[baseline]
    assert [result.denominator for result in mine.results] == [result.denominator for result in single.results]
    assert all(result.applied for result in mine.results)
    losses = [[result.loss for result in outcome.results] for outcome in (mine, single)]
    loss_error = np.abs(np.subtract(*losses)).max() / np.abs(BATCH.advantages).mean()
    norm_error = relative(*([result.grad_norm for result in outcome.results] for outcome in (mine, single)))
    errors = {
        key: float((weight - single.weights[key]).norm() / single.weights[key].norm().clamp(min=1.0))
        for key, weight in mine.weights.items()
    }
    worst = max(errors, key=errors.get)
    print(f"{name}: loss {loss_error:.1e}, gradient norm {norm_error:.1e}, weights {errors[worst]:.1e} ({worst})")
    assert mine.weights.keys() == single.weights.keys()
    assert loss_error <= 1e-6
    assert norm_error <= 1e-6
    assert errors[worst] <= 1e-6, worst


@pytest.mark.parametrize("name", ["qwen2, full recomputation", "qwen2, selective recomputation"])
def test_recomputation_repeats_every_bit(outcomes, name):
    assert outcomes[name].results == outcomes["qwen2"].results


def test_the_updates_move_the_policy(root, outcomes):
    results = outcomes["qwen2"].results
    assert results[0].metrics["fipo/fraction_changed"] == 0.0, "on the first update the policy is the old one"
    assert min(result.metrics["fipo/fraction_changed"] for result in results[1:]) > 0.2
    assert results[0].denominator == 64 - 64 // 3


@pytest.mark.parametrize("name", [name for settings in SETTINGS.values() for name in settings if "bfloat16" in name])
def test_bfloat16_stays_near_float32(outcomes, name):
    """Loose on purpose: weights and activations carry 8 bits. Losses within 2e-2 of mean |A|, norms within 5e-2."""
    mine, single = outcomes[name], outcomes["qwen2"]
    losses = [[result.loss for result in outcome.results] for outcome in (mine, single)]
    loss_error = np.abs(np.subtract(*losses)).max() / np.abs(BATCH.advantages).mean()
    norm_error = relative(*([result.grad_norm for result in outcome.results] for outcome in (mine, single)))
    print(f"{name}: loss {loss_error:.1e}, gradient norm {norm_error:.1e}")
    assert all(result.applied for result in mine.results)
    assert {weight.dtype for weight in mine.weights.values()} == {torch.bfloat16}
    assert loss_error <= 2e-2
    assert norm_error <= 5e-2


# The sequences of the second update, which is spoilt and refused; the third is whole.
SPOILT = slice(1, 17)
POISONED = 5


def without_responses(batch: TrainBatch, sequences: slice) -> TrainBatch:
    mask = batch.response_mask.copy()
    mask[batch.sequence_starts[sequences.start] : batch.sequence_starts[sequences.stop]] = False
    return replace(batch, response_mask=mask)


def with_advantage(batch: TrainBatch, sequence: int | slice, value: float) -> TrainBatch:
    advantages = batch.advantages.copy()
    advantages[sequence] = value
    return replace(batch, advantages=advantages)


REFUSALS: dict[str, TrainBatch] = {
    "all masked": without_responses(BATCH, SPOILT),
    "all dropped": with_advantage(BATCH, SPOILT, -1.0),
    "advantage is NaN": with_advantage(BATCH, POISONED, math.nan),
    "gradient overflows": with_advantage(BATCH, POISONED, 3e38),
    "weight is NaN": BATCH,
}


@dataclass(frozen=True)
class Refusal:
    result: UpdateResult
    weights_unchanged: bool
    sequences: list[tuple[int, ...]]
    after: Outcome


def live_bits(actor: TinyActor) -> Tensor:
    return torch.cat([bits(parameter) for chunk in actor.chunks for parameter in chunk.parameters()])


def drop_everything(root: Path) -> tuple[UpdateResult, bool]:
    """An update in which every sequence is dropped, under averaging whose count includes dropped sequences."""
    official = FipoConfig.preset("official-32b", updates_per_rollout=3)
    with tiny_actor(root / "qwen2", {"max_tokens_per_micro_batch": 64}) as actor:
        train_step, micro_batches = prepare(actor, REFUSALS["all dropped"], official)
        for micro_batch in micro_batches[1]:
            assert micro_batch.old_log_probs is not None
            micro_batch.old_log_probs -= 5.0
        before = live_bits(actor)
        return train_step.update(micro_batches[1]), torch.equal(live_bits(actor), before)


def test_official_averaging_does_not_step_when_everything_is_dropped(root):
    ((result, unchanged),) = run_distributed(drop_everything, 1, root)
    assert result.denominator > 0
    assert (result.kept_tokens, math.isnan(result.loss)) == (0, True)
    assert not result.applied
    assert "no response token is left" in result.skip_reason
    assert unchanged


def refuse(root: Path, parallelism: dict[str, Any], names: list[str]) -> dict[str, Refusal]:
    """Run the spoilt update, then the whole one."""
    refusals = {}
    for name in names:
        with tiny_actor(root / "qwen2", {"max_tokens_per_micro_batch": 64, **parallelism}) as actor:
            train_step, micro_batches = prepare(actor, REFUSALS[name])
            if name == "all dropped":
                for micro_batch in micro_batches[1]:
                    # Old log-probabilities are on the last stage alone.
                    if micro_batch.old_log_probs is not None:
                        micro_batch.old_log_probs -= 5.0
            if name == "weight is NaN":
                for parameter in actor.chunks[-1].parameters():
                    parameter.data.view(-1)[0] = math.nan
            before = live_bits(actor)
            result = train_step.update(micro_batches[1])
            unchanged = torch.equal(live_bits(actor), before)
            after = Outcome([train_step.update(micro_batches[2])], exported(actor))
            sequences = [micro_batch.sequences for micro_batch in micro_batches[1]]
            refusals[name] = Refusal(result, unchanged, sequences, after)
    return refusals


def whole_update_alone(root: Path) -> Outcome:
    with tiny_actor(root / "qwen2", {"max_tokens_per_micro_batch": 64}) as actor:
        train_step, micro_batches = prepare(actor, BATCH)
        return Outcome([train_step.update(micro_batches[2])], exported(actor))


def refusals_and_whole(root: Path) -> tuple[dict[str, Refusal], Outcome]:
    return refuse(root, {}, list(REFUSALS)), whole_update_alone(root)


NO_TOKEN = "no response token is left to learn from (all masked, or every sequence dropped)"


@pytest.fixture(scope="module")
def single_refusals(root: Path) -> tuple[dict[str, Refusal], Outcome]:
    return run_distributed(refusals_and_whole, 1, root)[0]


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_update_leaves_no_trace(single_refusals, name):
    refusals, alone = single_refusals
    refusal = refusals[name]
    assert not refusal.result.applied
    assert refusal.weights_unchanged
    if name == "weight is NaN":
        assert not refusal.after.results[0].applied
        return
    assert refusal.after.results == alone.results
    for key, weight in alone.weights.items():
        assert torch.equal(refusal.after.weights[key], weight), key


@pytest.mark.parametrize("name", ["all masked", "all dropped"])
def test_an_update_without_a_token_says_so(single_refusals, name):
    result = single_refusals[0][name].result
    assert result.skip_reason == NO_TOKEN
    assert result.denominator == 0
    assert math.isnan(result.loss)
    assert result.grad_norm == 0.0
    if name == "all dropped":
        assert result.metrics["fipo/dropped_sequences"] == 16


def test_an_overflowing_gradient_is_told_from_a_bad_loss(single_refusals):
    result = single_refusals[0]["gradient overflows"].result
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    told = r"the gradient norm is (inf|nan), the loss is finite; not finite in (.*) and \d+ more"
    match = re.fullmatch(told, result.skip_reason)
    assert match and match[2].startswith("embedding.word_embeddings.weight (rank 0), decoder.layers.0.")


CULPRIT = (
    r"the loss is nan, first in micro-batch (\d+) of rank (\d+) \(sequences \[(.*)\] of the rollout batch\), "
    r"token (\d+) of the response of sequence (\d+): (.*)"
)


def assert_names_the_culprit(ranks: list[dict[str, Refusal]]) -> None:
    refusals = [rank["advantage is NaN"] for rank in ranks]
    for refusal in refusals:
        assert refusal.weights_unchanged
        assert refusal.result.skip_reason == refusals[0].result.skip_reason
    match = re.fullmatch(CULPRIT, refusals[0].result.skip_reason)
    assert match, refusals[0].result.skip_reason
    number, rank, sequences = int(match[1]), int(match[2]), [int(index) for index in match[3].split(",")]
    assert POISONED in sequences
    assert (int(match[5]), match[6]) == (POISONED, "advantages is nan")
    assert list(refusals[rank].sequences[number]) == sequences


@pytest.mark.parametrize("parallelism", [{}, PP, {"context_parallel_size": 2}], ids=["DP 2", "PP 2", "CP 2"])
def test_a_bad_loss_is_traced_to_its_sequences_on_every_grid(root, parallelism):
    names = ["advantage is NaN", "all dropped"]
    ranks = run_distributed(refuse, 2, root, parallelism, names)
    assert_names_the_culprit(ranks)
    for rank in ranks:
        dropped = rank["all dropped"]
        assert (dropped.result.skip_reason, dropped.weights_unchanged) == (NO_TOKEN, True)
        assert dropped.after.results[0].applied


def test_a_bad_loss_is_traced_to_its_sequences(single_refusals):
    assert_names_the_culprit([single_refusals[0]])
    reason = single_refusals[0]["weight is NaN"].result.skip_reason
    match = re.fullmatch(CULPRIT, reason)
    assert match and match[6].startswith("log_probs is nan")


# Each sequence fills a micro-batch of its own; the second is masked, or missing.
LENGTHS = [40, 38, 36, 34]


def masked_and_missing(root: Path) -> list[tuple[UpdateResult, dict[str, Tensor]]]:
    whole = random_batch(LENGTHS)
    mask = whole.response_mask.copy()
    mask[40:78] = False
    kept, tokens = np.array([0, 2, 3]), np.r_[0:40, 78:148]
    missing = TrainBatch(
        **{
            field.name: getattr(whole, field.name)[tokens if field.name in PER_TOKEN_FIELDS else kept]
            for field in dataclasses.fields(whole)
            if field.name not in ("temperature", "routing_file")
        },
        temperature=1.0,
    )
    outcomes = []
    for batch in (replace(whole, response_mask=mask), missing):
        with tiny_actor(root / "qwen2", {"max_tokens_per_micro_batch": 40}) as actor:
            train_step, micro_batches = prepare(actor, batch)
            assert [len(micro_batch.sequences) for micro_batch in micro_batches[0]] == [1] * batch.num_sequences
            outcomes.append((train_step.update(micro_batches[0]), exported(actor)))
    return outcomes


def test_a_micro_batch_that_is_all_masked_counts_for_nothing(root):
    (((masked, masked_weights), (missing, missing_weights)),) = run_distributed(masked_and_missing, 1, root)
    assert masked.applied
    assert masked.denominator == missing.denominator
    assert masked.loss == pytest.approx(missing.loss, rel=1e-12)
    assert masked.grad_norm == pytest.approx(missing.grad_norm, rel=1e-6)
    for name, weight in missing_weights.items():
        assert (masked_weights[name] - weight).norm() <= 1e-6 * weight.norm().clamp(min=1.0), name
