"""The whole of `megatron-fipo evaluate`: a model folder, prompts with answers, and how they are tried."""

from pathlib import Path

from megatron_fipo.config.base import config_class, require
from megatron_fipo.config.data import PromptFormat, PromptSource, check_sources
from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.reward import RewardConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.weight_sync import WeightSyncConfig


@config_class
class EvaluationData(PromptFormat):
    """Prompts with answers."""

    evaluation: PromptSource | tuple[PromptSource, ...]
    """One source, or a list of sources."""

    def __post_init__(self) -> None:
        """Check values and combinations."""
        PromptFormat.__post_init__(self)
        check_sources("evaluation", self.evaluation)


@config_class
class EvaluateConfig:
    """Everything `megatron-fipo evaluate` needs to know.

    A run's own file serves too: sections and fields that only training has are left out. Of sections that both have,
    fields about batches, updates and steps have no effect.
    """

    output_dir: Path
    """Directory of the results: new or empty, or of the same evaluation, which then goes on where it stopped."""

    seed: int = 1
    """Seed of sampling and of the intervals."""

    model: ModelConfig
    """The model."""

    data: EvaluationData
    """Prompts."""

    reward: RewardConfig = RewardConfig()
    """Scoring; its first term is the verdict."""

    rollout: RolloutConfig = RolloutConfig()
    """Generation."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Samples and estimates."""

    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """Weights to the engine."""

    chunk_sequences: int = 1024
    """Responses after which results are saved, rounded down to whole problems; a restart repeats at most these."""

    def __post_init__(self) -> None:
        """Check ranges, and what spans sections."""
        require(
            self.chunk_sequences >= 1,
            field="chunk_sequences",
            value=self.chunk_sequences,
            rule="must be at least 1",
            way_out="1024 is a good value",
        )
        require(
            not self.rollout.sglang.urls,
            field="rollout.sglang.urls",
            value=self.rollout.sglang.urls,
            rule="must be empty: nobody knows whether servers that run already have the weights of model.path",
            way_out="leave it away; servers are then started from model.path",
        )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        self.model.check_context_length(longest)
