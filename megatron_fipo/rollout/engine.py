"""What a rollout engine is: token ids in, token ids and log-probabilities out, weights by name."""

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_fipo.types import FinishReason, FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; log-probabilities are taken at it.
        top_p: Nucleus that is sampled from; log-probabilities are of the whole distribution.
        max_tokens: Longest response.
        stop_token_ids: Tokens that end a response; the one that did is its last token.
        greedy: Take the most likely token instead of sampling.
    """

    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    greedy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sample to generate.

    Attributes:
        prompt_id: The prompt.
        sample_index: Which of its samples.
        prompt_token_ids: [P] int32.
        seed: Seed of this sample's draws; equal seeds and weights give equal responses.
        sampling: How tokens are drawn.
    """

    prompt_id: str
    sample_index: int
    prompt_token_ids: IntArray
    seed: int
    sampling: SamplingParameters

    @property
    def request_id(self) -> str:
        """Names the request among those in flight."""
        return f"{self.prompt_id}#{self.sample_index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """A finished request.

    Attributes:
        request_id: The request.
        token_ids: [R] int32, the stop token included.
        log_probs: [R] float32, at sampling temperature.
        finish_reason: Why it ended.
        policy_version: Version of the weights that began it.
    """

    request_id: str
    token_ids: IntArray
    log_probs: FloatArray
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Some of the weights of one version, under their Hugging Face names.

    Attributes:
        tensors: Full tensors by name; valid only during the call that hands them over.
        policy_version: Version they belong to.
        is_last: Whether the version is complete with this bucket.
    """

    tensors: dict[str, Tensor]
    policy_version: int
    is_last: bool


class RolloutEngine(Protocol):
    """An engine as the rollout controller sees it."""

    async def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests and return."""
        ...

    def stream(self) -> AsyncIterator[GenerationResult]:
        """Yield results in the order they finish; end when nothing is left in flight."""
        ...

    async def abort(self, request_ids: Collection[str]) -> None:
        """End requests early; their results come with finish reason "abort"."""
        ...

    async def update(self, bucket: WeightBucket) -> None:
        """Take in one bucket of new weights; the last one makes the version current."""
        ...
