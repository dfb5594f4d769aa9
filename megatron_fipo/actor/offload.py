"""The actor's memory on the device, which it hands over while servers on the same devices generate.

megatron-core can empty its gradient buffers and move optimizer state, but not with these guarantees: its state goes to
memory that is not pinned and new each time, and shards of float32 weights become copies that no longer belong to the
model. Here storages are emptied and filled, so every view stays what it was.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

from megatron.core import parallel_state
from torch import Tensor, UntypedStorage

from megatron_fipo.actor.optimizer import ActorOptimizer, gradient_buffers
from megatron_fipo.platform.host_memory import HostMemory, empty, refill, storages_of


class ActorMemory:
    """Takes the actor off the device and puts it back, bit by bit the same; no rank talks to another.

    What is off the device must not be used: forward passes, updates, exports and the reference policy raise a RunError.
    The host memory is allocated when it is needed first, and used again from then on. On the CPU everything happens as
    on CUDA, with host memory on both sides.

    Args:
        chunks: Model chunks of this rank, wrapped for data parallelism.
        optimizer: Its optimizer; None where nothing is trained.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: ActorOptimizer | None) -> None:
        self.chunks, self.optimizer = list(chunks), optimizer
        self._state_host, self._parameter_host = HostMemory(), HostMemory()
        self._gradients: list[tuple[UntypedStorage, int]] = []
        self._freed_bytes = 0

    @property
    def host_bytes(self) -> int:
        """Host memory allocated so far."""
        return self._state_host.num_bytes + self._parameter_host.num_bytes

    def drain(self) -> int:
        """Bytes freed on the device since the last call."""
        freed, self._freed_bytes = self._freed_bytes, 0
        return freed

    def offload_optimizer(self) -> None:
        """Drop the gradients; move Adam's moments and the float32 main weights to the host.

        Forward passes still work. Nothing happens where they are off the device already.
        """
        if self._gradients or self._state_host.in_use:
            return
        if self.optimizer is not None:
            self.optimizer.optimizer.zero_grad()
            owned = {storage._cdata for storage in storages_of(self._parameters())}
            state = storages_of(self.optimizer.state_tensors())
            # Without main weights of its own the optimizer steps the model's.
            self._freed_bytes += self._state_host.take([each for each in state if each._cdata not in owned])
        # Gathered activations, which megatron-core keeps under sequence parallelism.
        parallel_state.get_global_memory_buffer().buffer.clear()
        gradients = storages_of(gradient_buffers(self.chunks))
        self._gradients = [(storage, storage.nbytes()) for storage in gradients]
        self._freed_bytes += empty(gradients)

    def offload_parameters(self) -> None:
        """Move the model's weights to the host, where they are not there already."""
        if not self._parameter_host.in_use:
            self._freed_bytes += self._parameter_host.take(storages_of(self._parameters()))

    def restore_parameters(self) -> None:
        """Put the weights back: forward passes and exports work again.

        Raises:
            RunError: The device has no memory for them.
        """
        self._parameter_host.give_back()

    def restore(self) -> None:
        """Put everything back that is off the device; gradients are zero.

        Raises:
            RunError: The device has no memory for it; it can be tried again.
        """
        self.restore_parameters()
        self._state_host.give_back()
        refill(self._gradients)
        for gradients in gradient_buffers(self.chunks) if self._gradients else ():
            gradients.zero_()
        self._gradients = []

    def _parameters(self) -> Iterator[Tensor]:
        for chunk in self.chunks:
            yield from chunk.parameters()
