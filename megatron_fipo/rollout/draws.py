"""Draws of a served engine: groups on their way, finished ones, and what is counted from one batch to the next."""

import asyncio
import math
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_fipo.rollout.admission import oldest_version
from megatron_fipo.rollout.engine import GenerationResult
from megatron_fipo.types import Prompt, RolloutGroup, Sample


@dataclass(slots=True, eq=False)
class Draw:
    """A group on its way.

    Attributes:
        number: The draw's.
        prompt: Its prompt.
        begun: Version of the weights that began each sample, by its index, or began it again.
        kept: What an earlier run had of its samples, by their index.
        group: Its responses so far, scored or waiting for that.
        task: Generates it; None before its turn has come.
    """

    number: int
    prompt: Prompt
    begun: dict[int, int] = field(default_factory=dict)
    kept: dict[int, Sample] = field(default_factory=dict)
    group: RolloutGroup = field(init=False)
    task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        """Begin with an empty group."""
        self.group = RolloutGroup(prompt=self.prompt, samples=[])

    @classmethod
    def of_kept(cls, number: int, group: RolloutGroup) -> "Draw":
        """A draw that goes on from what an earlier run had of its group."""
        kept = {sample.sample_index: sample for sample in group.samples}
        begun = {index: sample.policy_version for index, sample in kept.items()}
        return cls(number, group.prompt, begun, kept)

    @property
    def version(self) -> int | None:
        """The oldest of them; None before anything began."""
        return min(self.begun.values(), default=None)


@dataclass(frozen=True, slots=True)
class FinishedDraw:
    """A finished group and its draw's number."""

    number: int
    group: RolloutGroup

    @property
    def version(self) -> int:
        """Version of the weights that began its oldest sample."""
        return oldest_version(self.group)


@dataclass(slots=True)
class Period:
    """From one full batch to the next.

    Attributes:
        first_number: Draws from it on are of this period.
        first_round: Groups that a first round of prompts has; `max_generation_rounds` of them are tried at most.
        num_generated: Groups finished, whatever became of them.
        num_tokens: Tokens of their responses.
        rewards: Rewards of their responses.
        without_signal: Those set aside by dynamic sampling.
    """

    first_number: int
    first_round: int
    num_generated: int = 0
    num_tokens: int = 0
    rewards: list[float] = field(default_factory=list)
    without_signal: list[FinishedDraw] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """All of it but the groups, as plain JSON values."""
        return {
            "first_number": self.first_number,
            "first_round": self.first_round,
            "num_generated": self.num_generated,
            "num_tokens": self.num_tokens,
            "rewards": list(self.rewards),
        }


def is_scored(sample: Sample) -> bool:
    """Whether a sample has its reward."""
    return not math.isnan(sample.reward)


def as_sample(prompt: Prompt, index: int, result: GenerationResult) -> Sample:
    """What there is of a response, without its text."""
    return Sample(
        prompt_id=prompt.id,
        sample_index=index,
        response_token_ids=result.token_ids,
        rollout_log_probs=result.log_probs,
        finish_reason=result.finish_reason,
        policy_version=result.policy_version,
        policy_versions=result.policy_versions,
        routed_experts=result.routed_experts,
    )


def as_result(request_id: str, sample: Sample) -> GenerationResult:
    """The response that a sample was made of, or the part of it that there is."""
    return GenerationResult(
        request_id=request_id,
        token_ids=sample.response_token_ids,
        log_probs=sample.rollout_log_probs,
        finish_reason=sample.finish_reason,
        policy_version=sample.policy_version,
        policy_versions=sample.policy_versions,
        routed_experts=sample.routed_experts,
    )


def as_it_is(group: RolloutGroup) -> RolloutGroup:
    """A copy that later scores leave alone; arrays are shared."""
    return RolloutGroup(prompt=group.prompt, samples=[replace(sample) for sample in group.samples])
