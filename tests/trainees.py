"""Actors of the invariance suite with all that their updates need, to be saved, loaded and trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.actor.checkpoint import ActorCheckpoint
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.train_step import TrainStep
from tests.invariance.grid import Combination
from tests.invariance.updates import ALGORITHMS, BUDGETS, OPTIMIZERS, micro_batches
from tests.tiny_actors import TinyActor, bits, tiny_actor


@dataclass
class Trainee:
    """An actor with what its updates need, whose batch is of the weights that it was built with."""

    actor: TinyActor
    optimizer: ActorOptimizer
    train_step: TrainStep
    updates: list[list[MicroBatch]]
    checkpoint: ActorCheckpoint

    def state(self) -> list[bytes]:
        """All that this rank would have to restore, but for the model's own weights."""
        tensors = [each for chunk in self.actor.chunks for each in chunk.parameters()]
        tensors += list(self.optimizer.state_tensors())
        told = [
            str(self.optimizer.num_steps),
            str(self.optimizer.learning_rate),
            str(self.optimizer.schedule.num_steps),
        ]
        return [*(bits(each).numpy().tobytes() for each in tensors), *(each.encode() for each in told)]


@contextmanager
def trainee(root: Path, combination: Combination, dtype: str = "float32", **model: Any) -> Iterator[Trainee]:
    torch.use_deterministic_algorithms(True)
    parallelism = combination.parallelism | {"max_tokens_per_micro_batch": BUDGETS["large"]}
    with tiny_actor(root / combination.model, parallelism, dtype=dtype, **model) as actor:
        settings = replace(OPTIMIZERS[combination.model], warmup_steps=3)
        optimizer = ActorOptimizer(actor.chunks, settings, actor.provider.bf16)
        train_step = TrainStep(actor.forward, optimizer, ALGORITHMS["fipo"], actor.context)
        updates = micro_batches(actor, combination)
        for update in updates:
            for micro_batch, log_probs in zip(update, actor.forward.log_probs(update), strict=False):
                micro_batch.old_log_probs = log_probs
        checkpoint = ActorCheckpoint(actor.chunks, optimizer, actor.context)
        yield Trainee(actor, optimizer, train_step, updates, checkpoint)


def save(trainee: Trainee, folder: Path) -> dict[str, str]:
    """Save and wait; hashes of the ranks' files, on rank 0."""
    make(folder)
    files = trainee.checkpoint.begin_save(folder).finish()
    return {name: record.sha256 for name, record in files.items()}


def make(folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
