"""Compares the answer with the reference, character by character."""

import re
from dataclasses import dataclass

from megatron_fipo.rewards.base import BadReferenceError, Response, Verdict
from megatron_fipo.rewards.extraction import find_by_pattern


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """1 where the answer is the reference answer, both without outer white space; else 0.

    Attributes:
        answer_pattern: Where the answer stands; None compares the whole response.
    """

    answer_pattern: re.Pattern[str] | None

    def read_reference(self, response: Response) -> None:
        """Refuse a prompt without a reference answer, as `Term.read_reference`."""
        if response.reference is None:
            raise BadReferenceError("there is no reference answer")

    def grade(self, response: Response) -> Verdict:
        """Judge one response, as `Term.grade`."""
        answer = find_by_pattern(response.text, self.answer_pattern)
        assert response.reference is not None
        return Verdict(float(answer == response.reference.strip()), answer)

    def same_answer(self, first: str, second: str) -> bool:
        """Whether the texts are the same, without outer white space."""
        return first.strip() == second.strip()
