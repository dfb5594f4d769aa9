"""Rewards of samples: of a wave, handed in as they come and collected at its end, or each by itself."""

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from megatron_fipo.rewards.base import Response, RewardError
from megatron_fipo.rewards.pool import RewardPool, Score, ScoreFailure, ScoreJob
from megatron_fipo.types import Prompt, RolloutGroup, Sample

logger = logging.getLogger(__name__)

_Waiting = tuple[RolloutGroup, Sample, Future[list[Score | ScoreFailure]]]


@dataclass(slots=True)
class Scoring:
    """Scores samples in a reward pool while others are still generated.

    Attributes:
        pool: Where they are scored.
        on_error: "fatal" ends the run with the first failure, "skip" takes the sample out of its group.
        num_errors: Samples without a reward, because a term failed.
        num_timeouts: Samples whose answer was given up for its time or memory; it counts as wrong.
        num_bad_references: Samples without a reward, because the prompt's reference answer cannot be used.
        num_waiting: Samples that `score` waits for.
    """

    pool: RewardPool
    on_error: Literal["fatal", "skip"]
    num_errors: int = 0
    num_timeouts: int = 0
    num_bad_references: int = 0
    num_waiting: int = 0
    _waiting: list[_Waiting] = field(default_factory=list)
    _reported: set[str] = field(default_factory=set)

    def hand_in(self, group: RolloutGroup, sample: Sample) -> None:
        """Have a sample of the group scored; returns at once."""
        self._waiting.append((group, sample, self._submit(group.prompt, sample)))

    async def score(self, group: RolloutGroup, sample: Sample) -> bool:
        """Have a sample of the group scored, and wait: fill in its reward, or take it out of the group.

        Returns:
            Whether it has a reward.

        Raises:
            RewardError: A term failed and `on_error` is "fatal".
        """
        self.num_waiting += 1
        try:
            (outcome,) = await asyncio.wrap_future(self._submit(group.prompt, sample))
        finally:
            self.num_waiting -= 1
        return self._settle(group, sample, outcome)

    def _submit(self, prompt: Prompt, sample: Sample) -> Future[list[Score | ScoreFailure]]:
        response = Response(
            text=sample.response_text,
            finish_reason=sample.finish_reason,
            num_tokens=len(sample.response_token_ids),
            prompt=prompt.text,
            reference=prompt.answer,
            metadata=prompt.metadata,
        )
        job = ScoreJob(f"{prompt.id}#{sample.sample_index}", response)
        return self.pool.submit([job])

    async def collect(self) -> AsyncIterator[tuple[RolloutGroup, Sample]]:
        """Wait for all that was handed in: fill in rewards, and take samples without one out of their groups.

        A prompt whose reference answer cannot be used is reported once, and never ends the run.

        Yields:
            Group and sample of each that has a reward now.

        Raises:
            RewardError: A term failed and `on_error` is "fatal".
        """
        waiting, self._waiting = self._waiting, []
        for group, sample, future in waiting:
            (outcome,) = await asyncio.wrap_future(future)
            if self._settle(group, sample, outcome):
                yield group, sample

    def counters(self) -> dict[str, float]:
        """What has been counted since the last call, as metrics."""
        counted: dict[str, float] = {
            "rollout/reward_errors": self.num_errors,
            "rollout/reward_timeouts": self.num_timeouts,
            "rollout/reward_bad_references": self.num_bad_references,
        }
        self.num_errors = self.num_timeouts = self.num_bad_references = 0
        return counted

    def _settle(self, group: RolloutGroup, sample: Sample, outcome: Score | ScoreFailure) -> bool:
        if isinstance(outcome, Score):
            sample.score, sample.reward = outcome.score, outcome.reward
            sample.reward_terms, sample.answer = outcome.terms, outcome.answer
            self.num_timeouts += outcome.timed_out
            return True
        self._apply_policy(group.prompt, outcome)
        # By identity: samples hold arrays, which have no single equality.
        group.samples = [each for each in group.samples if each is not sample]
        return False

    def _apply_policy(self, prompt: Prompt, failure: ScoreFailure) -> None:
        if failure.kind == "reference":
            self.num_bad_references += 1
            if prompt.id not in self._reported:
                self._reported.add(prompt.id)
                logger.error("prompt %s cannot be scored by %s: %s", prompt.id, failure.term, failure.problem)
            return
        if self.on_error == "fatal":
            raise RewardError(failure.sample_id, f"{failure.term}: {failure.problem}")
        self.num_errors += 1
        logger.warning("reward of %s: %s: %s; left out", failure.sample_id, failure.term, failure.problem)
