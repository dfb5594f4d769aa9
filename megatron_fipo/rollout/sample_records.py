"""Which responses of a batch are kept for people to read, and what is kept of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_fipo.types import RolloutGroup


def sampled_groups(num_groups: int, count: int) -> list[int]:
    """Which groups of a batch lend their first sample to samples.jsonl: evenly spread ones."""
    chosen = np.linspace(0, num_groups - 1, min(count, num_groups)).round().astype(int)
    return list(dict.fromkeys(chosen.tolist()))


def sample_records(step: int, groups: Sequence[RolloutGroup], count: int) -> list[dict[str, Any]]:
    """The lines of samples.jsonl of a step: plain JSON values.

    Args:
        step: Number of the step.
        groups: The batch's groups.
        count: How many lines at most.
    """
    firsts = np.cumsum([0, *(len(group.samples) for group in groups)])
    records = []
    for index in sampled_groups(len(groups), count):
        group = groups[index]
        sample = group.samples[0]
        records.append(
            {
                "step": step,
                "sequence": int(firsts[index]),
                "prompt_id": group.prompt.id,
                "prompt": group.prompt.text,
                "response": sample.response_text,
                "answer": group.prompt.answer,
                "reward": float(sample.reward),
                "finish_reason": sample.finish_reason,
                "response_tokens": len(sample.response_token_ids),
                "group_rewards": [float(each) for each in group.rewards],
            }
        )
    return records
