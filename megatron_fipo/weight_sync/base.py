"""From the actor's parameters to an engine: Hugging Face names, in buckets of bounded size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_fipo.rollout.engine import ServerAddress, WeightBucket


class WeightSync(Protocol):
    """Sends weights to the embedded engine; collective over all trainer ranks."""

    def push(self, policy_version: int) -> None:
        """Make the engine generate with the current weights, as `policy_version`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What became of one transfer of weights; the same on every trainer rank.

    Attributes:
        num_bytes: Bytes of one whole set of weights.
        failed: Why a server did not take them in, by its name; such a server has half of them and must not serve.
    """

    num_bytes: int
    failed: Mapping[str, str] = field(default_factory=dict)


class WeightTransport(Protocol):
    """Sends the actor's weights to servers that are paused; collective over all trainer ranks."""

    def push(self, policy_version: int, servers: Sequence[ServerAddress]) -> PushReport:
        """Give every server the actor's current weights, as `policy_version`.

        It speaks to the servers itself, from `begin_weight_update` to `end_weight_update`, and leaves alone whether
        they are paused. What goes wrong with a server is reported, never raised.

        Args:
            policy_version: The version.
            servers: Those that are to have it; the same on every rank.
        """
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
