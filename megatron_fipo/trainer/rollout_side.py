"""Everything that generates: engine, weights and controller."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.agreement import on_every_rank
from megatron_fipo.types import Prompt
from megatron_fipo.weight_sync.base import WeightSync


@dataclass(slots=True, kw_only=True)
class RolloutSide:
    """Everything that generates; absent in train-only runs.

    Attributes:
        engine: This rank's engine.
        weight_sync: Feeds it.
        controller: Drives it; on rank 0 alone.
        evaluation_prompts: Held-out prompts, on rank 0 alone.
    """

    engine: EmbeddedEngine
    weight_sync: WeightSync
    controller: RolloutController | None
    evaluation_prompts: Sequence[Prompt] = ()

    def generate[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        """Let rank 0 drive the engine while all ranks decode; collective over all ranks.

        Args:
            drive: What the controller is to do.

        Returns:
            What `drive` gives on rank 0, None elsewhere.

        Raises:
            RunError: From `drive`; raised on every rank.
        """
        return on_every_rank(lambda: self._take_part(drive))

    def _take_part[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        if self.controller is None:
            self.engine.follow()
            return None
        # After any other error the ranks are out of step, and a release could wait for ever.
        try:
            result = asyncio.run(drive(self.controller))
        except RunError:
            self.engine.release()
            raise
        self.engine.release()
        return result
