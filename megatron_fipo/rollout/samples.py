"""From a prompt to the requests for its samples, and from a request's result to the sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
from megatron_fipo.runtime.errors import NonFiniteError
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.types import Prompt, Sample

# Token ids of a response to its text, the stop token left out.
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleMaker:
    """Asks for samples and reads them.

    Attributes:
        decode: Token ids to text.
        seed: The run's seed.
    """

    decode: Decode
    seed: int

    def requests(
        self,
        prompt: Prompt,
        place: int | str,
        group_size: int,
        seed_scope: tuple[int | str, ...],
        sampling: SamplingParameters,
        with_routing: bool = False,
    ) -> list[GenerationRequest]:
        """Requests for a group.

        Args:
            prompt: The prompt.
            place: Keeps two draws of one prompt apart in the requests' names.
            group_size: How many.
            seed_scope: Part of every sample's seed, beside the run's seed, the prompt and the sample's index.
            sampling: How tokens are drawn.
            with_routing: Whether routed experts are wanted.
        """
        return [
            GenerationRequest(
                prompt_id=f"{place}:{prompt.id}",
                sample_index=index,
                prompt_token_ids=prompt.token_ids,
                seed=derive_seed(self.seed, *seed_scope, prompt.id, index),
                sampling=sampling,
                with_routing=with_routing,
            )
            for index in range(group_size)
        ]

    def read(self, prompt: Prompt, request: GenerationRequest, result: GenerationResult) -> Sample:
        """The sample that a result is, without a reward.

        Raises:
            NonFiniteError: The model gave a response without a probability.
        """
        if not np.isfinite(result.log_probs).all():
            place = int(np.argmin(np.isfinite(result.log_probs)))
            raise NonFiniteError(
                f"prompt {prompt.id}, sample {request.sample_index}: the log-probability of response token {place} is "
                f"{result.log_probs[place]}; the engine's weights of policy version {result.policy_version} are "
                "broken: check the model's files, or lower optimizer.learning_rate"
            )
        ids = result.token_ids
        shown = ids[:-1] if result.finish_reason == "stop" else ids
        return Sample(
            prompt_id=prompt.id,
            sample_index=request.sample_index,
            response_token_ids=ids,
            rollout_log_probs=result.log_probs,
            finish_reason=result.finish_reason,
            policy_version=result.policy_version,
            policy_versions=result.policy_versions,
            routed_experts=result.routed_experts,
            response_text=self.decode(shown.tolist()),
        )
