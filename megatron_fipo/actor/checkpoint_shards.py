"""What this rank holds of the actor's state: boxes of whole tensors, whose names and shapes no layout changes.

The names are those of megatron-core's `fully_reshardable` checkpoints, one tensor a layer and expert. Its own way there
gathers the optimizer's state on every data-parallel rank, in host memory. A range of a flattened tensor is a few boxes
of the tensor, though, so each rank writes the range that its optimizer steps, and reads the range that it will step.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.parallel.context import ParallelContext

# Everything that belongs to an optimizer is named so; the rest are weights.
OPTIMIZER_PREFIX = "optimizer.state."

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Stepped:
    """What an optimizer of this rank steps of one parameter: a range of it, flattened.

    Attributes:
        parameter: The model's parameter.
        start: First element of the range.
        states: Adam's moments, and the float32 weights where the model has others; each as long as the range.
        is_shared_out: Whether data-parallel ranks step different ranges, not all the same one.
    """

    parameter: Tensor
    start: int
    states: dict[str, Tensor]
    is_shared_out: bool

    @property
    def stop(self) -> int:
        """End of the range."""
        return self.start + next(iter(self.states.values())).numel()


def shards_to_write(
    chunks: Sequence[Any], optimizer: ActorOptimizer | None, context: ParallelContext
) -> list[ShardedTensor]:
    """This rank's part of a checkpoint: over all ranks every element once, in equal shares where optimizers shard.

    Args:
        chunks: Model chunks of this rank.
        optimizer: Its optimizer; None for weights alone.
        context: This rank's place.
    """
    stepped = {id(each.parameter): each for each in _stepped(optimizer)}
    is_shared_out = optimizer is not None and chunks[0].ddp_config.use_distributed_optimizer
    shards: list[ShardedTensor] = []
    for base in _weights(chunks, context):
        mine = stepped.get(id(base.data))
        if not (is_shared_out and base.data.requires_grad):
            shards += _whole(base)
        elif mine is not None:
            shards += _range(base, mine, "", base.data.detach().view(-1)[mine.start : mine.stop])
        shards += _states(base, mine)
    return [shard for shard in shards if is_main_replica(shard.replica_id)]


def shards_to_read(
    chunks: Sequence[Any], optimizer: ActorOptimizer | None, context: ParallelContext
) -> list[ShardedTensor]:
    """All that this rank needs of a checkpoint; what is read goes into the live tensors.

    Args:
        chunks: Model chunks of this rank.
        optimizer: Its optimizer; None for weights alone.
        context: This rank's place.
    """
    stepped = {id(each.parameter): each for each in _stepped(optimizer)}
    shards: list[ShardedTensor] = []
    for base in _weights(chunks, context):
        shards += _whole(base)
        shards += _states(base, stepped.get(id(base.data)))
    return shards


def count_names(shards: Sequence[ShardedTensor], prefix: str = "") -> int:
    """How many tensors begin in these shards; over all ranks' shards to write, the number of tensors.

    Args:
        shards: From `shards_to_write`.
        prefix: Beginning of the names that count.
    """
    return sum(not any(shard.global_offset) for shard in shards if shard.key.startswith(prefix))


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut a range of a row-major tensor into boxes, in the order of the range: at most 2 · (number of axes) − 1.

    Args:
        shape: Shape of the tensor.
        start: First element of the range.
        stop: End of the range, greater than `start`.

    Yields:
        Offsets and sizes, by axis.
    """
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)


def _weights(chunks: Sequence[Any], context: ParallelContext) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """Parameters and persistent buffers under megatron-core's names."""
    for chunk in unwrap(list(chunks)):
        # Tensors of their own for layers, experts, gate and up: names that do not depend on how layers are stacked.
        metadata = {"singleton_local_shards": True, "dp_cp_group": context.groups.dp_cp}
        for base in chunk.sharded_state_dict(metadata=metadata).values():
            # Transformer Engine's extra states are pickles, and empty without FP8.
            if not isinstance(base, ShardedObject):
                yield base


def _whole(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Its tensors: one, or those that a fused matrix is made of. Their data are views of the parameter."""
    return base.build() if isinstance(base, ShardedTensorFactory) else [base]


def _states(base: ShardedTensor | ShardedTensorFactory, stepped: Stepped | None) -> Iterator[ShardedTensor]:
    if stepped is None:
        return
    for name, state in stepped.states.items():
        yield from _range(base, stepped, f"{OPTIMIZER_PREFIX}{name}.", state.detach().view(-1))


def _range(
    base: ShardedTensor | ShardedTensorFactory, stepped: Stepped, prefix: str, values: Tensor
) -> Iterator[ShardedTensor]:
    """Boxes of a range of a parameter, with values of the range as their data."""
    for whole in _whole(base):
        assert whole.data.is_contiguous(), f"{whole.key} is not a range of its parameter"
        first = whole.data.storage_offset() - stepped.parameter.storage_offset()
        start, stop = max(stepped.start, first), min(stepped.stop, first + whole.data.numel())
        if start >= stop:
            continue
        replica = (*whole.replica_id[:-1], 0) if stepped.is_shared_out else whole.replica_id
        position = start - stepped.start
        for offsets, sizes in boxes(whole.local_shape, start - first, stop - first):
            size = math.prod(sizes)
            yield ShardedTensor(
                key=prefix + whole.key,
                data=values[position : position + size].view(sizes),
                dtype=values.dtype,
                local_shape=sizes,
                global_shape=whole.global_shape,
                global_offset=tuple(map(sum, zip(whole.global_offset, offsets, strict=True))),
                axis_fragmentations=None,
                replica_id=replica,
                allow_shape_mismatch=whole.allow_shape_mismatch,
            )
            position += size


def _stepped(optimizer: ActorOptimizer | None) -> Iterator[Stepped]:
    for part in optimizer.parts if optimizer is not None else ():
        # A rank without any such weights has a part without an optimizer.
        if part.optimizer is None:
            continue
        # Adam makes its moments at its first step; before, they are zeros.
        part.init_state_fn(part.optimizer, part.config)
        for parameter, main, start in _main_weights(part):
            moments = {name: part.optimizer.state[main][name] for name in ("exp_avg", "exp_avg_sq")}
            # In float32 the optimizer steps the model's own weights.
            states = moments if main.dtype == parameter.dtype else {"param": main, **moments}
            yield Stepped(parameter, start, states, isinstance(part, DistributedOptimizer))


def _main_weights(part: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Each parameter with the tensor that Adam steps in its place, and where that begins in it."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, place) in part.model_param_group_index_map.items():
            start = part._get_model_param_range_map(parameter)["param"].start
            yield parameter, part.optimizer.param_groups[group]["params"][place], start
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for parameter, main in zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True):
            yield parameter, main, 0
        for parameter in chain(*part.fp32_from_fp32_groups):
            yield parameter, parameter, 0
    else:
        for parameter in part.get_parameters():
            yield parameter, parameter, 0
