"""Checks, before a run, that prompts have what the reward's terms need."""

from collections.abc import Sequence

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.reward import OverlongTerm, PythonTerm, ReasoningGymTerm, RewardConfig
from megatron_fipo.types import Prompt


def check_prompts(config: RewardConfig, prompts: Sequence[Prompt], field: str = "data") -> None:
    """Check that every prompt has what its reward needs.

    Args:
        config: The reward.
        prompts: The prompts.
        field: Where they come from in the configuration, such as data.train; for messages.

    Raises:
        ConfigError: A prompt lacks the reasoning-gym entry, or the reference answer.
    """
    for name, term in config.terms.items():
        if isinstance(term, PythonTerm | OverlongTerm):
            continue
        if isinstance(term, ReasoningGymTerm):
            lacking = [prompt.id for prompt in prompts if "entry" not in prompt.metadata]
            need = "a reasoning-gym problem behind every prompt"
            way_out = "use another type, such as exact_match, or take the prompts from a reasoning-gym task"
        else:
            lacking = [prompt.id for prompt in prompts if prompt.answer is None]
            need = "a reference answer for every prompt"
            way_out = 'use "reasoning_gym", whose scorers know a task with many right answers, or "python"'
        if lacking:
            raise ConfigError(
                field=f"reward.terms.{name}.type",
                value=term.type,
                rule=f"needs {need}, and {len(lacking)} of {len(prompts)} in {field} have none, {lacking[0]} first",
                way_out=way_out,
            )
