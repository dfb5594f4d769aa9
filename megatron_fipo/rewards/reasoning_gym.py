"""Asks a reasoning-gym task's own scorer; importing this module imports reasoning-gym, which takes a second."""

import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from megatron_fipo.rewards.answer_guard import may_be_scored
from megatron_fipo.rewards.base import BadReferenceError, Response, Verdict
from megatron_fipo.rewards.extraction import find_by_pattern

MAX_ANSWER_CHARACTERS = 10_000


@dataclass(frozen=True, slots=True)
class ReasoningGym:
    """1 where the score of the prompt's task reaches the threshold, else 0: no credit for parts of an answer.

    An answer that the task's scorer fails on counts as wrong, because several of them fail on text of another
    form than they expect; so does one of more than 10,000 characters. The task is set up with the parameters
    its problems were made with, as some scorers use them.

    Attributes:
        answer_pattern: Where the answer stands; None takes the whole response.
        score_threshold: Lowest score that is right.
    """

    answer_pattern: re.Pattern[str] | None
    score_threshold: float

    def read_reference(self, response: Response) -> None:
        """The task's own record stands for the reference answer."""

    def grade(self, response: Response) -> Verdict:
        """Judge one response, as `Term.grade`.

        Raises:
            BadReferenceError: No task made the prompt, or its scorer fails on its own reference answer or gives no
                number.
        """
        if "entry" not in response.metadata:
            raise BadReferenceError("there is no reasoning-gym problem behind the prompt")
        task_name, entry = response.metadata["task"], response.metadata["entry"]
        answer = find_by_pattern(response.text, self.answer_pattern)
        if answer is None or len(answer) > MAX_ANSWER_CHARACTERS or not may_be_scored(task_name, answer):
            return Verdict(0.0, answer)
        task = _task(task_name, json.dumps(response.metadata["parameters"]))
        try:
            score = float(task.score_answer(answer, entry))
        except Exception:
            _check_scorer(task, task_name, entry)
            return Verdict(0.0, answer)
        if not math.isfinite(score):
            raise BadReferenceError(f"the scorer of {task_name} says {score}")
        return Verdict(float(score >= self.score_threshold), answer)

    def same_answer(self, first: str, second: str) -> bool:
        """Whether the texts are the same; a task's scorer knows the right answer alone."""
        return first.strip() == second.strip()


def _check_scorer(task: Any, task_name: str, entry: Any) -> None:
    """Tell a scorer that fails on its reference answer from an answer that it fails on."""
    try:
        task.score_answer(entry["answer"], entry)
    except Exception as error:
        problem = f"the scorer of {task_name} fails on its own reference answer ({type(error).__name__}: {error})"
        raise BadReferenceError(problem) from error


@functools.cache
def _task(name: str, parameters: str) -> Any:
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(parameters))
