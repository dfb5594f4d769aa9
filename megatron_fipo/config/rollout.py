"""How responses are generated."""

import math
from typing import Literal

from megatron_fipo.config.base import config_class, require
from megatron_fipo.config.sglang import SglangConfig


@config_class
class RolloutConfig:
    """Sampling, the engine, and how far it may run ahead."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """"embedded": a transformers model in the trainer's own processes, bitwise repeatable. "sglang": servers."""

    sglang: SglangConfig = SglangConfig()
    """Servers, where the engine is "sglang"."""

    colocated: bool = False
    """Whether SGLang's servers use the trainer's GPUs: either has the memory in turn."""

    num_prompts_per_step: int = 512
    """Prompts (groups) in one training batch."""

    group_size: int = 16
    """Samples of each prompt."""

    max_response_tokens: int = 20480
    """Longest response, in tokens."""

    temperature: float = 1.0
    """Sampling temperature; log-probabilities are taken at it everywhere."""

    top_p: float = 1.0
    """Nucleus of the sampling distribution; 1 samples from all of it."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, beside the model's own end-of-sequence tokens."""

    policy_lag: int = 0
    """Weight versions that generation may be behind training; 0 is synchronous."""

    max_requests_in_flight: int = 4096
    """Requests sent to SGLang's servers and not answered yet."""

    partial_rollouts: bool = False
    """Responses that a weight sync or a full batch interrupts go on from their tokens, with newer weights. SGLang only;
    needs policy_lag of at least 1."""

    replay_routing: bool = False
    """Mixture of experts: the trainer sends each token to the experts that the engine chose (R3). SGLang only."""

    max_generation_rounds: int = 10
    """With dynamic sampling: rounds of new prompts for one batch. After the last one the batch is filled up with groups
    without a signal; where none has a signal, the run stops with the reason."""

    over_sampling: float = 1.0
    """Prompts drawn in each round, as a multiple of the groups that are missing. More than 1 spares rounds where many
    groups have no signal; groups beyond a full batch are surplus."""

    carry_over_max_lag: int = 0
    """Weight versions that surplus groups may be behind when a later batch begins with them; 0 discards surplus."""

    max_batch_sequences: int = 256
    """Sequences that the embedded engine decodes at once on each rank."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        for field in (
            "num_prompts_per_step",
            "group_size",
            "max_response_tokens",
            "max_requests_in_flight",
            "max_generation_rounds",
            "max_batch_sequences",
        ):
            value = getattr(self, field)
            require(value >= 1, field=field, value=value, rule="must be at least 1", way_out="set it to 1 or more")
        require(
            1 <= self.over_sampling <= 16,
            field="over_sampling",
            value=self.over_sampling,
            rule="must lie in [1, 16]",
            way_out="1 draws as many prompts as are missing",
        )
        require(
            self.carry_over_max_lag >= 0,
            field="carry_over_max_lag",
            value=self.carry_over_max_lag,
            rule="must not be negative",
            way_out="0 discards surplus groups",
        )
        require(
            0 < self.temperature < math.inf,
            field="temperature",
            value=self.temperature,
            rule="must be finite and greater than 0 (log-probabilities of a greedy policy do not exist)",
            way_out="1.0 is the usual value",
        )
        require(
            0 < self.top_p <= 1,
            field="top_p",
            value=self.top_p,
            rule="must lie in (0, 1]",
            way_out="1.0 is the usual value",
        )
        require(
            self.policy_lag >= 0,
            field="policy_lag",
            value=self.policy_lag,
            rule="must not be negative",
            way_out="0 is synchronous",
        )
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse what the embedded engine cannot do: it generates in the trainer's processes, in turn with them."""
        asked = {"policy_lag": 0, "partial_rollouts": False, "replay_routing": False, "colocated": False}
        for field, without in asked.items():
            require(
                self.engine != "embedded" or getattr(self, field) == without,
                field=field,
                value=getattr(self, field),
                rule=f"must be {str(without).lower()} with the embedded engine, which shares the trainer's processes",
                way_out=f'set it to {str(without).lower()}, or rollout.engine to "sglang"',
            )
        require(
            not self.colocated or self.policy_lag == 0 or self.partial_rollouts,
            field="policy_lag",
            value=self.policy_lag,
            rule="must be 0 where servers share the trainer's GPUs and so generate in turn with it",
            way_out="set it to 0, set partial_rollouts, or give the servers GPUs of their own",
        )
        require(
            not self.partial_rollouts or self.policy_lag >= 1,
            field="partial_rollouts",
            value=self.partial_rollouts,
            rule="needs policy_lag of at least 1: the first tokens are of older weights than the last",
            way_out="raise policy_lag",
        )
        require(
            not (self.replay_routing and self.sglang.use_router),
            field="sglang.use_router",
            value=True,
            rule="must be false with replay_routing: the router does not pass on that experts are asked for",
            way_out="drop either",
        )
