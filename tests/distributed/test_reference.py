"""The reference policy answers as the model did when it was copied, on every grid, and leaves no trace in the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.reference import ReferencePolicy
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.platform.device import compute_device
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import TinyActor, bits, random_batch, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

UPDATES = 3
BATCH = random_batch([40, 33, 21, 38, 9, 27, 30, 12, 35, 24, 18, 40], num_mini_batches=UPDATES)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)

Setting = tuple[str, dict[str, Any], dict[str, Any]]
BF16 = {"dtype": "bfloat16"}
SETTINGS: dict[str, Setting] = {
    "DP 2, distributed optimizer": ("qwen2", {}, {}),
    "DP 2, distributed optimizer, bfloat16": ("qwen2", {}, BF16),
    "DP 2, whole optimizer": ("qwen2", {"use_distributed_optimizer": False}, {}),
    "TP 2 + SP": ("qwen2", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
    "CP 2": ("qwen2", {"context_parallel_size": 2}, {}),
    "PP 2, tied embeddings": ("qwen2", {"pipeline_model_parallel_size": 2}, {}),
    "PP 2 × VPP 2": (
        "qwen2",
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {},
    ),
    "EP 2": ("qwen3_moe", {"expert_model_parallel_size": 2}, {}),
    "TP 2 + SP × EP 2, bfloat16": (
        "qwen3_moe",
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
        BF16,
    ),
}


@dataclass(frozen=True)
class Seen:
    """What one rank saw.

    Attributes:
        moved: Whether the updates changed this rank's log-probabilities and weights.
        first, second: Whether the reference's were the initial ones, twice.
        restored, after_error: Whether the weights were the moved ones after a pass, and after one that raised.
        num_bytes: Of the copy, and of the parameters.
        weights: Bits of all weights after the last update.
    """

    moved: bool
    first: bool
    second: bool
    restored: bool
    after_error: bool
    num_bytes: tuple[int, int]
    weights: Tensor


def live_bits(actor: TinyActor) -> Tensor:
    return torch.cat(
        [bits(tensor) for chunk in unwrap(actor.chunks) for tensor in (*chunk.parameters(), *chunk.buffers())]
    ).clone()


def scores(actor: TinyActor, micro_batches: list[list[MicroBatch]]) -> list[Tensor]:
    return [log_probs for mini_batch in micro_batches for log_probs in actor.forward.log_probs(mini_batch)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(bits(left), bits(right)) for left, right in zip(one, other, strict=True))


def start(actor: TinyActor) -> tuple[TrainStep, list[list[MicroBatch]], list[Tensor]]:
    algorithm = FipoConfig.preset("paper-v2", updates_per_rollout=UPDATES)
    train_step = TrainStep(
        actor.forward, ActorOptimizer(actor.chunks, OPTIMIZER, actor.provider.bf16), algorithm, actor.context
    )
    micro_batches = shard_micro_batches(
        BATCH if actor.context.rank == 0 else None, packing_rules(actor.parallelism), actor.context, compute_device()
    )
    initial = scores(actor, micro_batches)
    for micro_batch, log_probs in zip([each for part in micro_batches for each in part], initial, strict=False):
        micro_batch.old_log_probs = log_probs
    return train_step, micro_batches, initial


def raise_inside(actor: TinyActor, reference: ReferencePolicy, micro_batches: list[list[MicroBatch]]) -> None:
    """Let a forward pass raise in the last layer; on a pipeline after it, since its stages wait for each other."""

    def fail(*_: Any) -> None:
        raise ArithmeticError("the pass failed")

    with pytest.raises(ArithmeticError), reference.in_place():
        if actor.context.pp_size > 1:
            scores(actor, micro_batches)
            fail()
        layer = next(module for module in actor.chunks[-1].modules() if hasattr(module, "layers")).layers[-1]
        hook = layer.register_forward_pre_hook(fail)
        try:
            scores(actor, micro_batches)
        finally:
            hook.remove()


def observe(root: Path, settings: dict[str, Setting]) -> dict[str, Seen]:
    seen = {}
    for name, (architecture, parallelism, model) in settings.items():
        grid = {"max_tokens_per_micro_batch": 64, **parallelism}
        with tiny_actor(root / architecture, grid, **model) as actor:
            reference = ReferencePolicy(actor.chunks)
            num_bytes = sum(each.nbytes for chunk in actor.chunks for each in chunk.parameters())
            before = live_bits(actor)
            train_step, micro_batches, initial = start(actor)
            for mini_batch in micro_batches[:-1]:
                assert train_step.update(mini_batch).applied
            moved = live_bits(actor)
            on_last_stage = actor.context.is_pipeline_last_stage
            changed = not same(scores(actor, micro_batches), initial) or not on_last_stage
            with reference.in_place():
                inside = live_bits(actor)
                first = same(scores(actor, micro_batches), initial)
            restored = live_bits(actor)
            raise_inside(actor, reference, micro_batches)
            after_error = live_bits(actor)
            with reference.in_place():
                second = same(scores(actor, micro_batches), initial)
            train_step.update(micro_batches[-1])
            seen[name] = Seen(
                moved=changed and not torch.equal(moved, before),
                first=first and torch.equal(inside, before),
                second=second,
                restored=torch.equal(restored, moved),
                after_error=torch.equal(after_error, moved),
                num_bytes=(reference.num_bytes, num_bytes),
                weights=live_bits(actor),
            )
    return seen


def train_without(root: Path, settings: dict[str, Setting]) -> dict[str, Tensor]:
    weights = {}
    for name, (architecture, parallelism, model) in settings.items():
        with tiny_actor(root / architecture, {"max_tokens_per_micro_batch": 64, **parallelism}, **model) as actor:
            train_step, micro_batches, _ = start(actor)
            for mini_batch in micro_batches:
                train_step.update(mini_batch)
            weights[name] = live_bits(actor)
    return weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    for architecture in ("qwen2", "qwen3_moe"):
        write_tiny_model(root / architecture, architecture)
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[tuple[dict[str, Seen], dict[str, Tensor]]]:
    return run_distributed(both, 2, root)


def both(root: Path) -> tuple[dict[str, Seen], dict[str, Tensor]]:
    return observe(root, SETTINGS), train_without(root, SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_stays_what_the_model_was(ranks, name):
    for seen, _ in ranks:
        assert seen[name].moved
        assert seen[name].first
        assert seen[name].second, "a pass that raised changed the reference"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_is_left_as_it_was(ranks, name):
    for seen, without in ranks:
        assert seen[name].restored
        assert seen[name].after_error
        assert torch.equal(seen[name].weights, without[name]), "the next update saw that there was a reference"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rank_copies_what_it_holds(ranks, name):
    for seen, _ in ranks:
        copied, parameters = seen[name].num_bytes
        assert parameters <= copied <= 1.01 * parameters
