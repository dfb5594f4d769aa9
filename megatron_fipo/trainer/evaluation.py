"""Accuracy on held-out problems, sampled and greedy."""

import dataclasses

from megatron_fipo.metrics.estimators import wilson_interval
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.trainer.state import Run
from megatron_fipo.types import RolloutGroup


def evaluate_when_due(run: Run, step: int) -> dict[str, float]:
    """Evaluate before the first step, after the last, and every `evaluation.every_steps`.

    Collective over all ranks.

    Returns:
        Metrics on rank 0 (`eval/accuracy` at sampling temperature with its 95 % interval, `eval/greedy_accuracy`);
        nothing elsewhere or when none is due.

    Raises:
        RunError: A response could not be scored.
    """
    every = run.config.evaluation.every_steps
    due = step in (0, run.config.num_steps) or (every > 0 and step % every == 0)
    data = run.config.data
    if not due or run.rollout is None or data is None or data.evaluation is None or run.config.mode != "train":
        return {}
    with run.timer.phase("evaluation"):
        return run.rollout.generate(lambda controller: _evaluate(run, controller)) or {}


async def _evaluate(run: Run, controller: RolloutController) -> dict[str, float]:
    assert run.rollout is not None
    prompts = run.rollout.evaluation_prompts[: run.config.evaluation.num_prompts]
    # One seed scope for all evaluations: they differ by the weights alone.
    groups = await controller.generate_groups(prompts, 1, "evaluation", controller.sampling)
    rewards = _rewards(groups)
    low, high = wilson_interval(sum(rewards), len(rewards))
    metrics = {
        "eval/num_problems": float(len(rewards)),
        "eval/accuracy": sum(rewards) / len(rewards),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/response_length_mean": sum(len(g.samples[0].response_token_ids) for g in groups) / len(groups),
    }
    if run.config.evaluation.greedy:
        greedy = dataclasses.replace(controller.sampling, greedy=True)
        rewards = _rewards(await controller.generate_groups(prompts, 1, "evaluation", greedy))
        metrics["eval/greedy_accuracy"] = sum(rewards) / len(rewards)
    return metrics


def _rewards(groups: list[RolloutGroup]) -> list[float]:
    return [sample.reward for group in groups for sample in group.samples]
