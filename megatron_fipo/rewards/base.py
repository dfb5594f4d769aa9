"""What a scorer is, and what holds for every one of them."""

import math
from dataclasses import dataclass
from typing import Protocol

from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import FinishReason, Prompt


class Scorer(Protocol):
    """Scores responses.

    A scorer can be pickled and keeps no state between responses, so that it can work in other processes. It
    may be slow on purpose-made input, which only ending its process can stop: give it a process that can be
    ended.
    """

    def score(self, prompt: Prompt, response_text: str, finish_reason: FinishReason) -> float:
        """Score one response.

        Args:
            prompt: The prompt it answers.
            response_text: The decoded response, without its stop token.
            finish_reason: How it ended.

        Returns:
            The reward.

        Raises:
            RewardError: There is no score.
        """
        ...


class RewardError(RunError):
    """A response that a scorer failed on.

    Attributes:
        prompt_id: The prompt's id.
        problem: What happened.
    """

    def __init__(self, prompt_id: str, problem: str) -> None:
        super().__init__(prompt_id, problem)
        self.prompt_id = prompt_id
        self.problem = problem

    def __str__(self) -> str:
        return f"reward of a response to {self.prompt_id}: {self.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedScorer:
    """Another scorer with the rules that hold for all: unfinished responses, failures, and finite rewards.

    Attributes:
        scorer: The other scorer.
        require_stop: A response that did not end by itself scores 0.
    """

    scorer: Scorer
    require_stop: bool

    def score(self, prompt: Prompt, response_text: str, finish_reason: FinishReason) -> float:
        """Score one response, as `Scorer.score`."""
        if self.require_stop and finish_reason != "stop":
            return 0.0
        try:
            reward = float(self.scorer.score(prompt, response_text, finish_reason))
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(prompt.id, f"{type(error).__name__}: {error}") from error
        if not math.isfinite(reward):
            raise RewardError(prompt.id, f"{reward} is not a finite number")
        return reward
