"""The reduced gradient of every parameter under its Hugging Face name, however the model is cut."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.optimizer import ActorOptimizer, StepOutcome
from tests.tiny_actors import TinyActor


class GradientRecorder(ActorOptimizer):
    """An optimizer that keeps the whole gradient of every step, as it is before clipping.

    Attributes:
        gradients: One dictionary a step.
    """

    def __init__(self, actor: TinyActor, *args, **kwargs) -> None:
        super().__init__(actor.chunks, *args, **kwargs)
        self.actor = actor
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, apply: bool = True) -> StepOutcome:
        self.gradients.append(whole_gradients(self.actor))
        return super().step(apply)


@torch.no_grad()
def whole_gradients(actor: TinyActor) -> dict[str, Tensor]:
    """Gradients after their reduction, float32, on every rank; collective over all ranks.

    The way from megatron-core's parameters to Hugging Face's tensors is linear, so that it serves gradients as well.
    """
    for chunk in actor.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            if chunk.ddp_config.use_distributed_optimizer:
                for bucket in buffer.buckets:
                    _gather_shards(bucket.grad_data, buffer.data_parallel_group)
    with _gradients_as_weights(actor):
        return exported(actor)


def exported(actor: TinyActor) -> dict[str, Tensor]:
    """The parameters under their Hugging Face names; collective over all ranks."""
    return {name: tensor.clone() for name, tensor in actor.bridge.export(unwrap(actor.chunks))}


def _gather_shards(whole: Tensor, group: dist.ProcessGroup) -> None:
    """Fill a bucket, of which every rank has reduced one of equal parts, with all parts."""
    mine = whole.chunk(group.size())[group.rank()].clone()
    dist.all_gather_into_tensor(whole, mine, group=group)


@contextmanager
def _gradients_as_weights(actor: TinyActor) -> Iterator[None]:
    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.copy_(parameter.main_grad)
    try:
        yield
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
