"""The order in which prompts are drawn."""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fipo.config.base import require


class PromptSampler:
    """Draws prompt indices, epoch after epoch, in an order that depends on seed and epoch alone.

    Each epoch draws every prompt once. A request may reach into the next epoch, where a prompt of this one
    can come again: one request may hold a prompt twice.

    Args:
        num_prompts: Size of the prompt set.
        seed: Seed of the order.
        shuffle: Draw in a new random order each epoch; else in the set's order.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts = {num_prompts}: must be at least 1")
        require(seed >= 0, field="seed", value=seed, rule="must not be negative", way_out="use 0 or more")
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """Whole passes over the prompts so far."""
        return self._epoch

    def next_indices(self, n: int) -> list[int]:
        """Draw the next `n` prompt indices."""
        drawn: list[int] = []
        while len(drawn) < n:
            piece = self._order[self._position : self._position + n - len(drawn)]
            drawn.extend(piece.tolist())
            self._position += len(piece)
            if self._position == self._num_prompts:
                self._start_epoch(self._epoch + 1)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here; plain JSON values."""
        return {
            "num_prompts": self._num_prompts,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the sampler that wrote `state` stood.

        Raises:
            ConfigError: It was written with another number of prompts, seed or shuffling, so that it would go
                on in another order.
        """
        own = {
            "data.train": ("num_prompts", self._num_prompts),
            "seed": ("seed", self._seed),
            "data.shuffle": ("shuffle", self._shuffle),
        }
        for field, (name, value) in own.items():
            require(
                state[name] == value,
                field=field,
                value=f"{value} prompts" if name == "num_prompts" else value,
                rule=f"the checkpoint was written with {state[name]}, and a resumed run keeps its prompts' order",
                way_out="restore it, or start a new run from the checkpoint's weights",
            )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self._num_prompts)
        generator = np.random.default_rng(np.random.SeedSequence([self._seed, epoch]))
        return generator.permutation(self._num_prompts)
