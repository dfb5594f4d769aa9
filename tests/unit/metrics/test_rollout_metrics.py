import numpy as np
import pytest

from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.rollout_metrics import batch_metrics, group_metrics
from megatron_fipo.types import FinishReason, Prompt, RolloutGroup, Sample, TrainBatch


def sample(
    length: int,
    *,
    reward: float = 0.0,
    score: float = float("nan"),
    finish_reason: FinishReason = "stop",
    terms: dict[str, float] | None = None,
) -> Sample:
    return Sample(
        prompt_id="p",
        sample_index=0,
        response_token_ids=np.zeros(length, dtype=np.int32),
        rollout_log_probs=np.zeros(length, dtype=np.float32),
        finish_reason=finish_reason,
        policy_version=0,
        reward=reward,
        score=score,
        reward_terms=terms or {},
    )


def group(source: str, *samples: Sample) -> RolloutGroup:
    prompt = Prompt(id="p", token_ids=np.zeros(3, dtype=np.int32), text="", source=source)
    return RolloutGroup(prompt=prompt, samples=list(samples))


GROUPS = [
    group(
        "math",
        sample(10, reward=0.5, score=1.0, terms={"answer": 1.0, "overlong": -0.5}),
        sample(30, reward=-1.0, score=-1.0, finish_reason="length", terms={"answer": -1.0, "overlong": 0.0}),
    ),
    group("logic/easy", sample(20, reward=0.3, score=0.3, terms={"answer": 0.3})),
    group("math", sample(40, reward=1.0, score=1.0, terms={"answer": 1.0, "overlong": 0.0})),
]


def test_samples_are_told_apart_by_source_and_term() -> None:
    metrics = group_metrics(GROUPS)
    assert metrics == pytest.approx(
        {
            "rollout/score_mean": 1.3 / 4,
            "rollout/accuracy": 0.5,
            "rollout/truncated_fraction": 0.25,
            "rollout/logic/easy/num_sequences": 1,
            "rollout/logic/easy/reward_mean": 0.3,
            "rollout/logic/easy/score_mean": 0.3,
            "rollout/logic/easy/accuracy": 0.0,
            "rollout/logic/easy/truncated_fraction": 0.0,
            "rollout/logic/easy/response_length_mean": 20.0,
            "rollout/math/num_sequences": 3,
            "rollout/math/reward_mean": 0.5 / 3,
            "rollout/math/score_mean": 1 / 3,
            "rollout/math/accuracy": 2 / 3,
            "rollout/math/truncated_fraction": 1 / 3,
            "rollout/math/response_length_mean": 80 / 3,
            "reward/answer_mean": 1.3 / 4,
            "reward/overlong_mean": -0.5 / 4,
        }
    )
    assert not CATALOGUE.undeclared(metrics)


def test_without_names_and_scores_little_is_known() -> None:
    metrics = group_metrics([group("", sample(1, reward=1.0), sample(1, reward=0.0))])
    assert metrics == {"rollout/truncated_fraction": 0.0}


def test_lengths_are_of_the_whole_batch() -> None:
    lengths = np.arange(20, 0, -1, dtype=np.int32)
    count = len(lengths)
    batch = TrainBatch(
        token_ids=np.zeros(int(lengths.sum()) + 2 * count, dtype=np.int32),
        sequence_lengths=lengths + 2,
        prompt_lengths=np.full(count, 2, dtype=np.int32),
        response_mask=np.ones(int(lengths.sum()) + 2 * count, dtype=bool),
        rollout_log_probs=np.zeros(int(lengths.sum()) + 2 * count, dtype=np.float32),
        rewards=np.linspace(0, 1, count, dtype=np.float32),
        advantages=np.tile(np.float32([-2.0, 2.0]), count // 2),
        group_ids=np.zeros(count, dtype=np.int32),
        mini_batch_ids=np.zeros(count, dtype=np.int32),
        policy_versions=np.zeros(int(lengths.sum()) + 2 * count, dtype=np.int32),
        temperature=1.0,
    )
    metrics = batch_metrics(batch)
    assert metrics == pytest.approx(
        {
            "rollout/reward_mean": 0.5,
            "rollout/num_sequences": 20,
            "rollout/response_length_mean": 10.5,
            "rollout/response_length_min": 1,
            "rollout/response_length_p25": 5,
            "rollout/response_length_p50": 10,
            "rollout/response_length_p75": 15,
            "rollout/response_length_p95": 19,
            "rollout/response_length_max": 20,
            "rollout/prompt_length_mean": 2.0,
            "rollout/advantage_abs_mean": 2.0,
        }
    )
    assert not CATALOGUE.undeclared(metrics)
