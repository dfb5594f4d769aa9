import json

import numpy as np
import pytest

from megatron_fipo.rollout.sample_records import sample_records, sampled_groups
from megatron_fipo.types import Prompt, RolloutGroup, Sample


@pytest.mark.parametrize(
    ("groups", "count", "expected"), [(8, 3, [0, 4, 7]), (8, 1, [0]), (2, 5, [0, 1]), (1, 1, [0]), (8, 0, [])]
)
def test_sampled_groups_are_spread_evenly(groups: int, count: int, expected: list[int]) -> None:
    assert sampled_groups(groups, count) == expected


def group(name: str, *rewards: float) -> RolloutGroup:
    return RolloutGroup(
        prompt=Prompt(id=name, token_ids=np.array([1], dtype=np.int32), text=f"question {name}", answer="4"),
        samples=[
            Sample(
                prompt_id=name,
                sample_index=index,
                response_token_ids=np.arange(3, dtype=np.int32),
                rollout_log_probs=np.zeros(3, dtype=np.float32),
                finish_reason="stop",
                policy_version=0,
                response_text=f"response {name}{index}",
                reward=reward,
            )
            for index, reward in enumerate(rewards)
        ],
    )


def test_a_record_says_what_a_reader_wants_and_where_the_sample_lies_in_the_batch() -> None:
    groups = [group("a", 1.0, 0.0), group("b", 0.5), group("c", 0.0, 0.25)]
    records = sample_records(7, groups, 2)
    assert records[0] == {
        "step": 7,
        "sequence": 0,
        "prompt_id": "a",
        "prompt": "question a",
        "response": "response a0",
        "answer": "4",
        "reward": 1.0,
        "finish_reason": "stop",
        "response_tokens": 3,
        "group_rewards": [1.0, 0.0],
    }
    assert [(record["prompt_id"], record["sequence"]) for record in records] == [("a", 0), ("c", 3)]
    assert json.loads(json.dumps(records)) == records
