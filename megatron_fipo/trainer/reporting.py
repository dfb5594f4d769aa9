"""What a run says about itself: one metrics line a step, sampled responses, log lines."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_fipo.actor.train_step import UpdateResult
from megatron_fipo.metrics.evaluation_table import evaluation_table
from megatron_fipo.platform.device import peak_memory_bytes
from megatron_fipo.rollout.controller import Rollout
from megatron_fipo.trainer.state import Run
from megatron_fipo.trainer.token_report import sampled_groups
from megatron_fipo.types import RolloutGroup, TrainBatch

logger = logging.getLogger(__name__)

# Update metrics whose step value is not the mean over updates.
_SUMMED = ("fipo/dropped_sequences",)


def report_start(run: Run, evaluation: Mapping[str, float]) -> None:
    """Write the line of step 0: the evaluation before training."""
    times = run.timer.drain()
    if run.directory is not None:
        metrics = {"step": 0, **evaluation, **times}
        run.directory.append_metrics(metrics)
        run.progress.end_step(0, metrics)
        _log_evaluation(run, 0, evaluation)


def report_step(
    run: Run,
    step: int,
    rollout: Rollout | None,
    batch: TrainBatch | None,
    results: Sequence[UpdateResult],
    evaluation: Mapping[str, float],
) -> None:
    """Write a step's line to metrics.jsonl, samples to samples.jsonl, and a log line; rank 0 alone does anything."""
    times = run.timer.drain()
    if run.directory is None or batch is None:
        return
    metrics: dict[str, Any] = {"step": step, "policy_version": run.policy_version}
    metrics |= _batch_metrics(batch)
    if rollout is not None:
        metrics |= rollout.metrics
        run.directory.append_samples(_sample_records(step, rollout.groups, run.config.metrics.samples_per_step))
    metrics |= combine_updates(results)
    if run.actor.train_step is not None and not results:
        metrics |= {"train/updates": batch.num_mini_batches, "train/updates_skipped": batch.num_mini_batches}
    metrics |= evaluation
    metrics |= times
    metrics |= _throughput(batch, times)
    run.directory.append_metrics(metrics)
    run.progress.end_step(step, metrics)
    _log_step(run, metrics)
    _log_evaluation(run, step, evaluation)


def _batch_metrics(batch: TrainBatch) -> dict[str, float]:
    responses = batch.sequence_lengths - batch.prompt_lengths
    return {
        "rollout/reward_mean": float(batch.rewards.mean()),
        "rollout/num_sequences": batch.num_sequences,
        "rollout/response_length_mean": float(responses.mean()),
        "rollout/response_length_max": int(responses.max()),
        "rollout/prompt_length_mean": float(batch.prompt_lengths.mean()),
        "rollout/advantage_abs_mean": float(np.abs(batch.advantages).mean()),
    }


def combine_updates(results: Sequence[UpdateResult]) -> dict[str, Any]:
    """A step's metrics from those of its updates.

    Values are means over the updates, but for `_max` and `_min` and for counts, which are summed. An update with
    nothing to learn from (D = 0) has no loss, so it counts among the skipped alone. `fipo/null_future_kl_std` is of
    the first update.

    Args:
        results: The updates in order; none where there was nothing to do.
    """
    if not results:
        return {}
    counted = [result for result in results if result.denominator]
    metrics: dict[str, Any] = {
        "train/updates": len(results),
        "train/updates_skipped": sum(not result.applied for result in results),
        "train/loss": _mean([result.loss for result in counted]),
        "train/grad_norm": _mean([result.grad_norm for result in counted]),
        "train/learning_rate": results[-1].learning_rate,
        "train/loss_by_update": [result.loss for result in results],
        "train/grad_norm_by_update": [result.grad_norm for result in results],
    }
    for key in sorted({key for result in results for key in result.metrics} - set(metrics)):
        values = [result.metrics[key] for result in results if key in result.metrics]
        metrics[key] = _combine(key, values)
    return metrics | _null_mini_batch(results[0])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _combine(key: str, values: Sequence[float]) -> float:
    if key in _SUMMED:
        return float(np.sum(values))
    if key.endswith("_max"):
        return float(np.max(values))
    return float(np.min(values)) if key.endswith("_min") else _mean(values)


def _null_mini_batch(first: UpdateResult) -> dict[str, float]:
    """Spread of the Future-KL where it must be 0: before any update the policy is the old one."""
    if "fipo/future_kl_square_mean" not in first.metrics:
        return {}
    mean, square = first.metrics["fipo/future_kl_mean"], first.metrics["fipo/future_kl_square_mean"]
    return {"fipo/null_future_kl_std": max(square - mean**2, 0.0) ** 0.5}


def _throughput(batch: TrainBatch, times: Mapping[str, float]) -> dict[str, float]:
    rates = {"perf/peak_memory_gib": peak_memory_bytes() / 1024**3}
    response_tokens = float(batch.response_mask.sum())
    if times.get("time/rollout_s"):
        rates["perf/rollout_response_tokens_per_s"] = response_tokens / times["time/rollout_s"]
    if times.get("time/update_s"):
        rates["perf/update_tokens_per_s"] = float(batch.sequence_lengths.sum()) / times["time/update_s"]
    return rates


def _sample_records(step: int, groups: Sequence[RolloutGroup], count: int) -> list[dict[str, Any]]:
    """The first sample of evenly spread groups."""
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


def _log_step(run: Run, metrics: Mapping[str, Any]) -> None:
    seconds = sum(value for key, value in metrics.items() if key.startswith("time/"))
    parts = [
        f"step {metrics['step']}/{run.config.num_steps}",
        f"reward {metrics['rollout/reward_mean']:.3f}",
        f"length {metrics['rollout/response_length_mean']:.1f}",
    ]
    if "train/loss" in metrics:
        parts += [f"loss {metrics['train/loss']:+.5f}", f"grad norm {metrics['train/grad_norm']:.3f}"]
    if "fipo/influence_weight_mean" in metrics:
        parts.append(f"influence {metrics['fipo/influence_weight_mean']:.4f}")
    logger.info("%s (%.1f s)", ", ".join(parts), seconds)


def _log_evaluation(run: Run, step: int, evaluation: Mapping[str, float]) -> None:
    if not evaluation:
        return
    greedy = evaluation.get("eval/greedy_accuracy")
    logger.info(
        "evaluation after step %d: accuracy %.3f (%g %% interval %.3f to %.3f) on %d held-out problems%s",
        step,
        evaluation["eval/accuracy"],
        100 * run.config.evaluation.confidence,
        evaluation["eval/accuracy_low"],
        evaluation["eval/accuracy_high"],
        evaluation["eval/num_problems"],
        "" if greedy is None else f", greedy {greedy:.3f}",
    )
    if run.config.evaluation.samples_per_problem > 1:
        logger.info("by source:\n%s", "\n".join(evaluation_table(evaluation)))
