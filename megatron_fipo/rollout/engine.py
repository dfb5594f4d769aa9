"""What a rollout engine is: token ids in, token ids and log-probabilities out, weights by name."""

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.types import ExpertArray, FinishReason, FloatArray, IntArray


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
        sampling: How tokens are drawn; `max_tokens` counts those of `begun_token_ids` too.
        begun_token_ids: [B] int32, the response so far where an interrupted one goes on; the result has what follows.
        with_routing: Whether the experts that each token was sent to are wanted.
    """

    prompt_id: str
    sample_index: int
    prompt_token_ids: IntArray
    seed: int
    sampling: SamplingParameters
    begun_token_ids: IntArray | None = None
    with_routing: bool = False

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
        policy_versions: [R] int32, version of the weights that gave each token; None where all are of the first.
        routed_experts: [P + B + R − 1, MoE layers, k] int16, experts of each position but the last, where asked for.
    """

    request_id: str
    token_ids: IntArray
    log_probs: FloatArray
    finish_reason: FinishReason
    policy_version: int
    policy_versions: IntArray | None = None
    routed_experts: ExpertArray | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    """A server that generates, as weight synchronisation has to know it; small enough for every rank to have.

    Attributes:
        name: Names this life of the server: a restarted one has another name.
        url: Where it answers.
        tensor_parallel_size: Its ranks; each takes part in a broadcast of weights.
        policy_version: Version of its weights; −1 where it has those of the model folder, or half of a version.
    """

    name: str
    url: str
    tensor_parallel_size: int
    policy_version: int


class RolloutEngine(Protocol):
    """An engine as the rollout controller sees it."""

    async def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests and return."""
        ...

    def stream(self) -> AsyncIterator[GenerationResult]:
        """Yield results in the order they finish; end when nothing is left in flight."""
        ...

    async def abort(self, request_ids: Collection[str]) -> None:
        """End requests early; their results come with finish reason "abort" and what they have so far."""
        ...


@runtime_checkable
class ServedEngine(RolloutEngine, Protocol):
    """An engine whose servers go on by themselves, and take in weights between `pause` and `resume`.

    Requests may be submitted while others are in flight; any other engine decodes in waves.
    """

    @property
    def servers(self) -> Sequence[ServerAddress]:
        """Servers that are there now, those that wait for weights included."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Have every server stop where it is, so that its weights may change.

        With "abort", running requests end as by `abort`; with the others they go on after `resume`.
        """
        ...

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        """Go on with all servers that have taken in a version; those that failed to are restarted.

        Args:
            policy_version: The version.
            failed: Names of servers that did not take it in.

        Raises:
            RunError: No server is left.
        """
        ...
