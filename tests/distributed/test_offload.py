"""An actor that leaves the device between all phases trains bit by bit as one that stays."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.offload import ActorMemory
from megatron_fipo.actor.optimizer import ActorOptimizer, gradient_buffers
from megatron_fipo.actor.reference import ReferencePolicy
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.platform.device import compute_device
from megatron_fipo.platform.host_memory import storages_of
from megatron_fipo.runtime.errors import RunError
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import TinyActor, bits, random_batch, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

UPDATES = 2
BATCH = random_batch([40, 33, 21, 38, 9, 27, 30, 12], num_mini_batches=UPDATES)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)

Setting = tuple[str, dict[str, Any], dict[str, Any]]
BF16 = {"dtype": "bfloat16"}
WHOLE = {"use_distributed_optimizer": False}
TP_EP = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}
SETTINGS: dict[str, Setting] = {
    "DP 2, distributed optimizer": ("qwen2", {}, {}),
    "DP 2, distributed optimizer, bfloat16": ("qwen2", {}, BF16),
    "DP 2, whole optimizer": ("qwen2", WHOLE, {}),
    "DP 2, whole optimizer, bfloat16": ("qwen2", WHOLE, BF16),
    "DP 2, overlapped reduction": ("qwen2", {"overlap_grad_reduce": True}, {}),
    "CP 2, bfloat16": ("qwen2", {"context_parallel_size": 2}, BF16),
    "PP 2, tied embeddings": ("qwen2", {"pipeline_model_parallel_size": 2}, {}),
    "PP 2 × VPP 2": ("qwen2", {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "EP 2": ("qwen3_moe", {"expert_model_parallel_size": 2}, {}),
    "TP 2 + SP × EP 2, bfloat16": ("qwen3_moe", TP_EP, BF16),
}

# What lies between two phases: nothing, or a turn of the engine.
Turn = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """What training gave on one rank.

    Attributes:
        tensors: Bits of all weights, gradients, optimizer states, log-probabilities and exported weights, in order.
        refusals: What was said when something was used that was off the device.
        freed: Bytes freed on the device, by what was taken.
        held: Bytes of what was taken.
        host: Host memory after each turn of the engine.
    """

    tensors: list[Tensor]
    refusals: list[str]
    freed: dict[str, int]
    held: dict[str, int]
    host: list[int]


class Training:
    """Two updates with a reference policy, in phases."""

    def __init__(self, actor: TinyActor) -> None:
        self.actor = actor
        algorithm = FipoConfig.preset("paper-v2", updates_per_rollout=UPDATES)
        self.reference = ReferencePolicy(actor.chunks)
        self.optimizer = ActorOptimizer(actor.chunks, OPTIMIZER, actor.provider.bf16)
        self.train_step = TrainStep(actor.forward, self.optimizer, algorithm, actor.context)
        self.micro_batches = shard_micro_batches(
            BATCH if actor.context.rank == 0 else None,
            packing_rules(actor.parallelism),
            actor.context,
            compute_device(),
        )
        self.seen: list[Tensor] = []

    def phases(self, turn: Turn) -> None:
        turn()
        old = self.log_probs()
        for micro_batch, log_probs in zip(self.flat(), old, strict=False):
            micro_batch.old_log_probs = log_probs
        for mini_batch in self.micro_batches:
            turn()
            assert self.train_step.update(mini_batch).applied
            self.note(gradient_buffers(self.actor.chunks))
            turn()
            with self.reference.in_place():
                self.log_probs()
            turn()
            self.log_probs()
            self.note(tensor for _, tensor in self.actor.bridge.export(unwrap(self.actor.chunks)))
        turn()
        self.note(self.optimizer.state_tensors())
        self.note(tensor for chunk in unwrap(self.actor.chunks) for tensor in (*chunk.parameters(), *chunk.buffers()))

    def flat(self) -> list[MicroBatch]:
        return [each for mini_batch in self.micro_batches for each in mini_batch]

    def log_probs(self) -> list[Tensor]:
        found = [each for part in self.micro_batches for each in self.actor.forward.log_probs(part)]
        self.note(found)
        return found

    def note(self, tensors: Any) -> None:
        self.seen += [bits(tensor).clone() for tensor in tensors]


def train(actor: TinyActor) -> Outcome:
    training = Training(actor)
    training.phases(lambda: None)
    return Outcome(training.seen, [], {}, {}, [])


def train_in_turns(actor: TinyActor) -> Outcome:
    training = Training(actor)
    memory = ActorMemory(actor.chunks, training.optimizer)
    freed: dict[str, int] = {}
    host: list[int] = []

    def turn() -> None:
        memory.offload_optimizer()
        freed["training"] = memory.drain()
        memory.offload_parameters()
        freed["parameters"] = memory.drain()
        memory.restore_parameters()
        actor.forward.log_probs(training.micro_batches[0])
        memory.offload_parameters()
        memory.restore()
        assert memory.drain() == freed["parameters"]
        host.append(memory.host_bytes)
        assert all(not tensor.any() for tensor in gradient_buffers(actor.chunks))

    training.phases(turn)
    parameters = storages_of(each for chunk in actor.chunks for each in chunk.parameters())
    known = {storage._cdata for storage in parameters}
    state = [each for each in storages_of(training.optimizer.state_tensors()) if each._cdata not in known]
    gradients = storages_of(gradient_buffers(actor.chunks))
    held = {
        "training": sum(storage.nbytes() for storage in (*state, *gradients)),
        "parameters": sum(storage.nbytes() for storage in parameters),
    }
    return Outcome(training.seen, refusals(training, memory), freed, held, host)


def refusals(training: Training, memory: ActorMemory) -> list[str]:
    """What an actor without its memory says to all that would use it."""
    actor, mini_batch = training.actor, training.micro_batches[0]
    stage_export = actor.bridge.stage_export(unwrap(actor.chunks), actor.context)

    def use_reference() -> None:
        with training.reference.in_place():
            pass

    memory.offload_optimizer()
    memory.offload_optimizer()
    said = [error_of(lambda: training.train_step.update(mini_batch)), error_of(training.optimizer.step)]
    actor.forward.log_probs(mini_batch)
    memory.offload_parameters()
    memory.offload_parameters()
    said += [
        error_of(lambda: actor.forward.log_probs(mini_batch)),
        error_of(use_reference),
        error_of(lambda: next(actor.bridge.export(unwrap(actor.chunks)))),
        error_of(lambda: next(stage_export.stream())),
    ]
    memory.restore()
    memory.restore()
    assert training.train_step.update(mini_batch).applied
    return said


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(RunError) as caught:
        action()
    return str(caught.value)


def train_all(root: Path) -> dict[str, tuple[Outcome, Outcome]]:
    outcomes = {}
    for name, (architecture, parallelism, model) in SETTINGS.items():
        grid = {"max_tokens_per_micro_batch": 64, **parallelism}
        found = []
        for way in (train, train_in_turns):
            with tiny_actor(root / architecture, grid, **model) as actor:
                found.append(way(actor))
        outcomes[name] = (found[0], found[1])
    return outcomes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Outcome, Outcome]]]:
    root = tmp_path_factory.mktemp("offload")
    for architecture in ("qwen2", "qwen3_moe"):
        write_tiny_model(root / architecture, architecture)
    return run_distributed(train_all, 2, root)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_is_the_same_bit_by_bit(ranks, name):
    for outcomes in ranks:
        stayed, left = outcomes[name]
        assert len(stayed.tensors) == len(left.tensors)
        assert all(torch.equal(*pair) for pair in zip(stayed.tensors, left.tensors, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_all_memory_is_freed_and_host_memory_used_again(ranks, name):
    for outcomes in ranks:
        _, left = outcomes[name]
        assert left.freed == left.held
        # Adam's moments exist from the first update on.
        assert left.host[0] <= left.host[2]
        assert set(left.host[2:]) == {left.host[-1]}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_actor_without_its_memory_says_so(ranks, name):
    for outcomes in ranks:
        said = outcomes[name][1].refusals
        whose = ["the actor's gradients", "the optimizer's states", *["the actor's weights"] * 4]
        assert [text.partition(" are not on the device")[0] for text in said] == whose
