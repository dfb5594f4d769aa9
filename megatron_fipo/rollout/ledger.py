"""What becomes of every drawn prompt: it ends in exactly one way, and nothing is forgotten."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from megatron_fipo.types import Prompt

Fate = Literal["used", "no_signal", "incomplete", "stale", "surplus", "cut", "returned"]
"""How a draw ends.

Its group is in a batch ("used"), was refused ("no_signal", "incomplete", "stale"), was finished when the batch was full
and cannot be carried over ("surplus"), or was given up unfinished then ("cut"); or its prompt will be drawn again
("returned").
"""


@dataclass(frozen=True, slots=True)
class Settled:
    """A draw that has ended.

    Attributes:
        number: The draw's.
        prompt_id: Its prompt.
        fate: How it ended.
    """

    number: int
    prompt_id: str
    fate: Fate


@dataclass(frozen=True, slots=True)
class OpenPrompt:
    """A prompt that was drawn from the stream and has come to no end yet.

    Attributes:
        number: The draw's; None where the prompt waits to be drawn again.
        prompt: The prompt.
        is_ready: Whether its group is finished and waits for a batch.
    """

    number: int | None
    prompt: Prompt
    is_ready: bool


@dataclass(slots=True)
class Ledger:
    """Draws by number.

    Attributes:
        open: Draws that have not ended.
        counts: Draws that have, by how they did.
        num_drawn: All draws.
        settled: Those that have ended since the last `drain`.
    """

    open: dict[int, Prompt] = field(default_factory=dict)
    counts: Counter[Fate] = field(default_factory=Counter)
    num_drawn: int = 0
    settled: list[Settled] = field(default_factory=list)

    def draw(self, prompt: Prompt) -> int:
        """Enter a draw; returns its number, from 0."""
        number, self.num_drawn = self.num_drawn, self.num_drawn + 1
        self.open[number] = prompt
        return number

    def settle(self, number: int, fate: Fate) -> None:
        """Enter a draw's end.

        Raises:
            KeyError: It has ended before.
        """
        self.settled.append(Settled(number, self.open.pop(number).id, fate))
        self.counts[fate] += 1

    def drain(self) -> list[Settled]:
        """Draws that ended since the last call."""
        settled, self.settled = self.settled, []
        return settled
