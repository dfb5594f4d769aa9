"""Builds the scorer that the configuration names, and checks that it suits the prompts."""

import re
from collections.abc import Sequence

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.reward import RewardConfig
from megatron_fipo.rewards.base import CheckedScorer, Scorer
from megatron_fipo.rewards.exact_match import ExactMatchScorer
from megatron_fipo.types import Prompt


def build_scorer(config: RewardConfig) -> Scorer:
    """Build the configured scorer."""
    pattern = None if config.answer_pattern is None else re.compile(config.answer_pattern)
    scorer: Scorer
    if config.type == "reasoning_gym":
        # Only here: the library takes seconds to import, and other rewards do without it.
        from megatron_fipo.rewards.reasoning_gym import ReasoningGymScorer

        scorer = ReasoningGymScorer(answer_pattern=pattern, score_threshold=config.score_threshold)
    else:
        scorer = ExactMatchScorer(answer_pattern=pattern)
    return CheckedScorer(scorer=scorer, require_stop=config.require_stop)


def check_prompts(config: RewardConfig, prompts: Sequence[Prompt], field: str = "data") -> None:
    """Check, before a run, that every prompt has what its score needs.

    Args:
        config: The reward.
        prompts: The prompts.
        field: Where they come from in the configuration, such as data.train; for messages.

    Raises:
        ConfigError: A prompt lacks the reasoning-gym entry, or the reference answer.
    """
    if config.type == "reasoning_gym":
        lacking = [prompt.id for prompt in prompts if "entry" not in prompt.metadata]
        need = "a reasoning-gym problem behind every prompt"
        way_out = 'set reward.type to "exact_match", or take the prompts from a reasoning-gym task'
    else:
        lacking = [prompt.id for prompt in prompts if prompt.answer is None]
        need = "a reference answer for every prompt"
        way_out = 'set reward.type to "reasoning_gym", whose scorers know a task with many right answers'
    if lacking:
        raise ConfigError(
            field="reward.type",
            value=config.type,
            rule=f"needs {need}, and {len(lacking)} of {len(prompts)} in {field} have none, {lacking[0]} first",
            way_out=way_out,
        )
