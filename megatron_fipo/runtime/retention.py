"""Which checkpoints stay."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Rules of which each keeps some; what none keeps may go.

    Attributes:
        keep_last: The newest so many, at least 1.
        keep_every: All whose step is a multiple; 0 keeps none for that.
        keep_best: The so many with the best score; those without a score are none of them.
        best_metric: What a score is of.
        highest_is_best: Whether a greater score is the better one.
    """

    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = ""
    highest_is_best: bool = True

    def kept(self, scores: Mapping[int, float | None]) -> set[int]:
        """Steps whose checkpoints stay, the newest always among them.

        Args:
            scores: Score of every checkpoint by its step, None where it has none.
        """
        steps = sorted(scores)
        best = sorted(
            (step for step in steps if scores[step] is not None),
            # Of equals the later one.
            key=lambda step: ((scores[step] or 0.0) * (-1 if self.highest_is_best else 1), -step),
        )
        multiples = [step for step in steps if self.keep_every and step % self.keep_every == 0]
        return {*steps[-max(1, self.keep_last) :], *multiples, *best[: self.keep_best]}
