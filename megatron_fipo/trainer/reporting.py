"""What a run says about itself: one metrics line a step, sampled responses, log lines."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_fipo.actor.train_step import UpdateResult
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.evaluation_table import evaluation_table
from megatron_fipo.metrics.reduce import reduce_metrics
from megatron_fipo.metrics.rollout_metrics import batch_metrics
from megatron_fipo.parallel.agreement import on_main_rank
from megatron_fipo.platform.device import compute_device, host_memory_bytes, peak_memory_bytes
from megatron_fipo.rollout.controller import Rollout
from megatron_fipo.trainer.safeguards import null_future_kl_std
from megatron_fipo.trainer.state import Run, StepReport
from megatron_fipo.types import Accumulator, Metrics, TrainBatch, render_metrics

logger = logging.getLogger(__name__)


def report_evaluation(run: Run, step: int, measured: Mapping[str, float]) -> None:
    """Write the line of a step without updates: step 0, or the one that found no prompts.

    Args:
        run: This rank's view.
        step: The step.
        measured: Metrics of the evaluation and of a weight sync; read on rank 0 alone.
    """
    metrics = {"step": step, "policy_version": run.policy_version, **measured, **run.timer.drain()}
    on_main_rank(lambda: _write(run, metrics))
    if run.is_main:
        _log_evaluation(run, step, measured)


def finish_step(
    run: Run, step: int, rollout: Rollout | None, batch: TrainBatch | None, results: Sequence[UpdateResult]
) -> None:
    """Count a step, and put together what is to be told of it.

    Args:
        run: This rank's view.
        step: The step.
        rollout: Its rollout, on rank 0; None in train-only runs.
        batch: Its batch, on rank 0.
        results: Its updates.

    Raises:
        RunError: Samples cannot be written, or the run directory is gone; raised on every rank.
    """
    run.finished_steps, run.unreported = step, StepReport(step)
    on_main_rank(lambda: _put_together(run, step, rollout, batch, results))


def _put_together(
    run: Run, step: int, rollout: Rollout | None, batch: TrainBatch | None, results: Sequence[UpdateResult]
) -> None:
    assert run.directory is not None and batch is not None, "rank 0 has both"
    run.directory.require_here()
    metrics: dict[str, Any] = {"step": step, "policy_version": run.policy_version}
    metrics |= batch_metrics(batch)
    if rollout is not None:
        metrics |= rollout.metrics
        run.directory.append_samples(rollout.records)
    metrics |= combine_updates(results)
    if run.actor.train_step is not None and not results:
        metrics |= {"train/updates": batch.num_mini_batches, "train/updates_skipped": batch.num_mini_batches}
    metrics |= run.safeguards.take_metrics()
    run.unreported = StepReport(step, metrics, int(batch.sequence_lengths.sum()))


def report_step(run: Run, measured: Mapping[str, float]) -> None:
    """Write the metrics and log lines of the step that was finished last, on rank 0; collective over all ranks.

    Args:
        run: This rank's view.
        measured: Metrics of the evaluation and of the weight sync after it; read on rank 0 alone.
    """
    memory, report = _memory(), run.unreported
    assert report is not None, "a step was finished"
    report.metrics |= run.timer.drain()
    metrics = {**report.metrics, **measured}
    metrics |= throughput(report.num_tokens, metrics, metrics) | memory
    on_main_rank(lambda: _write(run, metrics))
    # Where it could not be written, a checkpoint says so, and the next start writes it.
    run.unreported = None
    if run.is_main:
        _log_step(run, metrics)
        _log_evaluation(run, report.step, measured)


def _write(run: Run, metrics: Mapping[str, Any]) -> None:
    assert run.metrics_writer is not None, "rank 0 has it"
    run.metrics_writer.write(metrics)
    run.progress.end_step(metrics["step"], metrics)


def combine_updates(results: Sequence[UpdateResult]) -> dict[str, Any]:
    """A step's metrics from those of its updates, each combined as the catalogue says.

    An update with nothing to learn from (no token kept) has no loss, so it counts among the skipped alone.

    Args:
        results: The updates in order; none where there was nothing to do.
    """
    if not results:
        return {}
    return {
        "train/updates": len(results),
        "train/updates_skipped": sum(not result.applied for result in results),
        **CATALOGUE.combine([_update_metrics(result) for result in results]),
    }


def _update_metrics(result: UpdateResult) -> dict[str, float]:
    # The loss of the update itself stands for the mean over tokens, which it may differ from.
    metrics = {key: value for key, value in result.metrics.items() if key != "train/loss"}
    metrics["train/learning_rate"] = result.learning_rate
    metrics["train/loss_by_update"], metrics["train/grad_norm_by_update"] = result.loss, result.grad_norm
    if result.kept_tokens:
        metrics["train/loss"], metrics["train/grad_norm"] = result.loss, result.grad_norm
    if (noise := null_future_kl_std(metrics)) is not None:
        metrics["fipo/null_future_kl_std"] = noise
    return metrics


def _memory() -> dict[str, float]:
    """Memory of the rank that uses most; collective over all ranks."""
    used = {"perf/peak_memory_gib": peak_memory_bytes(), "perf/host_memory_gib": host_memory_bytes()}
    one = torch.ones(1, dtype=torch.bool, device=compute_device())
    parts: Metrics = {key: Accumulator.max(one * (value / 1024**3), one) for key, value in used.items()}
    return render_metrics(reduce_metrics(parts))


def throughput(num_tokens: int, rollout: Mapping[str, float], times: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second of the phases that took place.

    Args:
        num_tokens: Prompt and response tokens of the batch.
        rollout: Metrics of its rollout; none in train-only runs.
        times: Seconds by phase.
    """
    # Servers generate for later steps, too, and while nobody waits for them.
    generation_s = rollout.get("rollout/serving_s", times.get("time/rollout_s"))
    counted = {
        "perf/rollout_response_tokens_per_s": (rollout.get("rollout/response_tokens_generated"), generation_s),
        "perf/old_log_probs_tokens_per_s": (num_tokens, times.get("time/old_log_probs_s")),
        "perf/update_tokens_per_s": (num_tokens, times.get("time/update_s")),
    }
    return {key: count / seconds for key, (count, seconds) in counted.items() if count and seconds}


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
    if "eval/accuracy" not in evaluation:
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
