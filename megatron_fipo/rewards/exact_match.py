"""Compares the answer with the reference."""

import re
from dataclasses import dataclass

from megatron_fipo.rewards.answer import find_answer
from megatron_fipo.types import FinishReason, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatchScorer:
    """1 where the answer is the prompt's reference answer, both without outer white space; else 0.

    Attributes:
        answer_pattern: Where the answer stands; None compares the whole response.
    """

    answer_pattern: re.Pattern[str] | None

    def score(self, prompt: Prompt, response_text: str, finish_reason: FinishReason) -> float:
        """Score one response, as `Scorer.score`."""
        if prompt.answer is None:
            raise ValueError("the prompt has no reference answer to compare with")
        return float(find_answer(response_text, self.answer_pattern) == prompt.answer.strip())
