"""Asks a reasoning-gym task's own scorer; importing this module imports reasoning-gym, which takes seconds."""

import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from megatron_fipo.rewards.answer import find_answer
from megatron_fipo.rewards.answer_guard import may_be_scored
from megatron_fipo.rewards.base import RewardError
from megatron_fipo.types import FinishReason, Prompt

MAX_ANSWER_CHARACTERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGymScorer:
    """1 where the score of the prompt's task reaches the threshold, else 0: no credit for parts of an answer.

    An answer that the task's scorer fails on counts as wrong, because several of them fail on text of another
    form than they expect; so does one of more than 10,000 characters. The task is set up with the parameters
    its problems were made with, as some scorers use them.

    Attributes:
        answer_pattern: Where the answer stands; None takes the whole response.
        score_threshold: Lowest score that is a reward of 1.
    """

    answer_pattern: re.Pattern[str] | None
    score_threshold: float

    def score(self, prompt: Prompt, response_text: str, finish_reason: FinishReason) -> float:
        """Score one response, as `Scorer.score`."""
        task_name, entry = prompt.metadata["task"], prompt.metadata["entry"]
        answer = find_answer(response_text, self.answer_pattern)
        if answer is None or len(answer) > MAX_ANSWER_CHARACTERS or not may_be_scored(task_name, answer):
            return 0.0
        task = _task(task_name, json.dumps(prompt.metadata["parameters"]))
        try:
            score = float(task.score_answer(answer, entry))
        except Exception:
            # The scorer must at least manage the reference; this fails, and is told, where it does not.
            task.score_answer(entry["answer"], entry)
            return 0.0
        if not math.isfinite(score):
            raise RewardError(prompt.id, f"the scorer of {task_name} says {score}")
        return float(score >= self.score_threshold)


@functools.cache
def _task(name: str, parameters: str) -> Any:
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(parameters))
