"""An actor on a CUDA device is saved while it trains on, and another one goes on from there bit by bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor.checkpoint import ActorCheckpoint
from megatron_fipo.actor.offload import ActorMemory
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.platform.device import compute_device
from tests.tiny_actors import bits, random_batch, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@dataclass
class Training:
    checkpoint: ActorCheckpoint
    memory: ActorMemory
    train_step: TrainStep
    mini_batch: list[Any]

    def update(self) -> None:
        assert self.train_step.update(self.mini_batch).applied

    def state(self) -> list[torch.Tensor]:
        optimizer, chunks = self.checkpoint.optimizer, self.checkpoint.chunks
        assert optimizer is not None
        tensors = [*optimizer.state_tensors(), *(each for chunk in chunks for each in chunk.parameters())]
        return [bits(each).clone().cpu() for each in tensors]


@contextmanager
def training(folder: Path, dtype: str) -> Iterator[Training]:
    with tiny_actor(folder, {"max_tokens_per_micro_batch": 64}, dtype=dtype) as actor:
        optimizer = ActorOptimizer(actor.chunks, OptimizerConfig(warmup_steps=0), actor.provider.bf16)
        ((*mini_batch,),) = shard_micro_batches(
            random_batch([40, 33, 21]), packing_rules(actor.parallelism), actor.context, compute_device()
        )
        for micro_batch, log_probs in zip(mini_batch, actor.forward.log_probs(mini_batch), strict=True):
            micro_batch.old_log_probs = log_probs
        yield Training(
            checkpoint=ActorCheckpoint(actor.chunks, optimizer, actor.context),
            memory=ActorMemory(actor.chunks, optimizer),
            train_step=TrainStep(actor.forward, optimizer, FipoConfig.preset("paper-v2"), actor.context),
            mini_batch=mini_batch,
        )


@pytest.mark.parametrize("leaves", [False, True], ids=["trains on", "leaves the device"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_actor_goes_on_bit_by_bit(world: None, tmp_path: Path, dtype: str, leaves: bool) -> None:
    model, folder = write_tiny_model(tmp_path / "model"), tmp_path / "actor"
    folder.mkdir()
    with training(model, dtype) as first:
        first.update()
        saved = first.state()
        pending = first.checkpoint.begin_save(folder)
        if leaves:
            first.memory.offload_optimizer()
            first.memory.offload_parameters()
            first.memory.restore()
        first.update()
        after = first.state()
        assert pending.finish()
    with training(model, dtype) as second:
        second.update()
        second.update()
        second.checkpoint.load(folder)
        assert all(torch.equal(*each) for each in zip(second.state(), saved, strict=True))
        second.update()
        assert all(torch.equal(*each) for each in zip(second.state(), after, strict=True))
