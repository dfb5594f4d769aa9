"""From the actor's parameters to an engine: Hugging Face names, in buckets of bounded size."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from megatron_fipo.rollout.engine import WeightBucket


class WeightSync(Protocol):
    """Sends the actor's weights to the engine; collective over all trainer ranks."""

    def push(self, policy_version: int) -> None:
        """Make the engine generate with the actor's current weights, as `policy_version`."""
        ...


def buckets(stream: Iterable[tuple[str, Tensor]], max_bytes: int, policy_version: int) -> Iterator[WeightBucket]:
    """Group a stream of named tensors into buckets.

    Args:
        stream: (Hugging Face name, full tensor) pairs.
        max_bytes: Size of a bucket; a tensor above it has a bucket of its own.
        policy_version: Version that the weights belong to.

    Yields:
        Buckets in order, the last one marked.
    """
    current: dict[str, Tensor] = {}
    size = 0
    for name, tensor in stream:
        num_bytes = tensor.numel() * tensor.element_size()
        if current and size + num_bytes > max_bytes:
            yield WeightBucket(tensors=current, policy_version=policy_version, is_last=False)
            current, size = {}, 0
        current[name] = tensor
        size += num_bytes
    yield WeightBucket(tensors=current, policy_version=policy_version, is_last=True)
