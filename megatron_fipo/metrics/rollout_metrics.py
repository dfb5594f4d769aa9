"""What a step's batch and groups say: lengths, rewards, accuracy, of all samples and by source and term."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from megatron_fipo.types import RolloutGroup, Sample, TrainBatch, nearest_rank, quantile_suffix

_LENGTH_QUANTILES = (250, 500, 750, 950)


def batch_metrics(batch: TrainBatch) -> dict[str, float]:
    """Metrics that a recorded batch has too."""
    responses = batch.sequence_lengths - batch.prompt_lengths
    places = nearest_rank(torch.tensor(_LENGTH_QUANTILES), torch.tensor(len(responses)))
    quantiles = np.sort(responses)[places.numpy()]
    return {
        "rollout/reward_mean": float(batch.rewards.mean()),
        "rollout/num_sequences": batch.num_sequences,
        "rollout/response_length_mean": float(responses.mean()),
        "rollout/response_length_min": int(responses.min()),
        "rollout/response_length_max": int(responses.max()),
        "rollout/prompt_length_mean": float(batch.prompt_lengths.mean()),
        "rollout/advantage_abs_mean": float(np.abs(batch.advantages).mean()),
        **{
            f"rollout/response_length_{quantile_suffix(level)}": int(length)
            for level, length in zip(_LENGTH_QUANTILES, quantiles, strict=True)
        },
    }


def group_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Metrics that need the scored samples.

    Args:
        groups: The batch's groups; not empty.
    """
    samples = [sample for group in groups for sample in group.samples]
    metrics = _verdicts("rollout", samples)
    by_source: dict[str, list[Sample]] = defaultdict(list)
    for group in groups:
        if group.prompt.source:
            by_source[group.prompt.source] += group.samples
    for source, own in sorted(by_source.items()):
        metrics |= {
            f"rollout/{source}/num_sequences": len(own),
            f"rollout/{source}/reward_mean": _mean([sample.reward for sample in own]),
            f"rollout/{source}/response_length_mean": _mean([len(sample.response_token_ids) for sample in own]),
            **_verdicts(f"rollout/{source}", own),
        }
    for term in sorted({term for sample in samples for term in sample.reward_terms}):
        # A sample that a term has nothing to say about gets nothing from it.
        metrics[f"reward/{term}_mean"] = _mean([sample.reward_terms.get(term, 0.0) for sample in samples])
    return metrics


def _verdicts(prefix: str, samples: Sequence[Sample]) -> dict[str, float]:
    metrics = {f"{prefix}/truncated_fraction": _mean([sample.finish_reason == "length" for sample in samples])}
    scores = [sample.score for sample in samples if sample.score == sample.score]
    if scores:
        metrics[f"{prefix}/score_mean"] = _mean(scores)
        metrics[f"{prefix}/accuracy"] = _mean([sample.is_correct for sample in samples])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values, dtype=np.float64))
