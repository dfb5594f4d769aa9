"""What is checked before a run."""

from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.reward import ExactMatchTerm, PythonTerm, ReasoningGymTerm, RewardConfig
from megatron_fipo.rewards.check import check_prompts
from megatron_fipo.types import Prompt


def prompt(answer: str | None = "42", **metadata: Any) -> Prompt:
    return Prompt(id="train:17", token_ids=np.array([1], dtype=np.int32), text="q", answer=answer, metadata=metadata)


def test_prompts_without_reference_are_found_before_the_run() -> None:
    config = RewardConfig()
    check_prompts(config, [prompt()] * 3)
    with pytest.raises(ConfigError) as caught:
        check_prompts(config, [prompt(), prompt(None), prompt(None)], "data.train")
    assert str(caught.value) == (
        "reward.terms.correct.type = exact_match: needs a reference answer for every prompt, and 2 of 3 in data.train "
        'have none, train:17 first; use "reasoning_gym", whose scorers know a task with many right answers, or "python"'
    )


def test_prompts_without_a_task_are_found_before_the_run() -> None:
    config = RewardConfig(terms={"solved": ReasoningGymTerm()})
    check_prompts(config, [prompt(None, entry={})])
    with pytest.raises(
        ConfigError, match=r"^reward.terms.solved.type = reasoning_gym: needs a reasoning-gym .* 1 of 2"
    ):
        check_prompts(config, [prompt(), prompt(entry={})])


def test_every_term_is_checked() -> None:
    function = PythonTerm(function="m:f")
    check_prompts(RewardConfig(terms={"mine": function}), [prompt(None)])
    with pytest.raises(ConfigError, match=r"^reward.terms.correct.type = exact_match"):
        check_prompts(RewardConfig(terms={"mine": function, "correct": ExactMatchTerm()}), [prompt(None)])
