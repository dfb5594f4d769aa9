"""A grader in the test's own process, for terms whose verdicts are looked at one by one."""

from collections.abc import Mapping
from typing import Any

from megatron_fipo.config.reward import RewardConfig, RewardTerm
from megatron_fipo.rewards.grader import Grader, describe_terms
from megatron_fipo.rewards.literals import as_literal


def make_grader(terms: Mapping[str, RewardTerm], max_response_tokens: int = 100, **config: Any) -> Grader:
    reward = RewardConfig(terms=dict(terms), **config)
    return Grader(
        describe_terms(reward),
        require_stop=reward.require_stop,
        timeout_s=reward.timeout_s,
        max_response_tokens=max_response_tokens,
        announce=lambda kind, term: None,
    )


def grade(grader: Grader, text: str, reference: str | None = None, **fields: Any) -> dict[str, Any]:
    metadata = repr(as_literal(dict(fields.pop("metadata", {}))))
    job = {"text": text, "reference": reference, "metadata": metadata, "given_up": [], "finish_reason": "stop"}
    return grader.grade(job | fields)
