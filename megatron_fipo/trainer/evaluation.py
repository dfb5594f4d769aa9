"""Accuracy on held-out problems, sampled and greedy."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import require
from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.engine import SamplingParameters
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.trainer.evaluation_files import EvaluationFiles
from megatron_fipo.trainer.evaluation_results import (
    ProblemResult,
    evaluation_metrics,
    problem_results,
    response_records,
)
from megatron_fipo.trainer.state import Run
from megatron_fipo.types import Prompt


def evaluate_when_due(run: Run, step: int) -> dict[str, float]:
    """Evaluate before the first step, after the last, and every `evaluation.every_steps`.

    Collective over all ranks. Rank 0 also writes `evaluations/step_N/` in the run directory.

    Returns:
        Metrics on rank 0, see `evaluation_metrics`; nothing elsewhere or when none is due.

    Raises:
        RunError: A response could not be scored.
    """
    every = run.config.evaluation.every_steps
    due = step in (0, run.config.num_steps) or (every > 0 and step % every == 0)
    data = run.config.data
    if not due or run.rollout is None or data is None or not data.has_evaluation or run.config.mode != "train":
        return {}
    with run.timer.phase("evaluation"):
        return run.rollout.generate(lambda controller: _evaluate(run, controller, step)) or {}


async def _evaluate(run: Run, controller: RolloutController, step: int) -> dict[str, float]:
    assert run.rollout is not None and run.directory is not None
    results, records = await try_problems(controller, run.rollout.evaluation_prompts, run.config.evaluation)
    _write(run.directory.evaluation(step), results, records)
    return evaluation_metrics(results, run.config.evaluation, interval_seed(run.config.seed))


def _write(folder: Path, results: Sequence[ProblemResult], records: Sequence[dict[str, Any]]) -> None:
    # A step that is done again after a crash is evaluated again.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    EvaluationFiles(folder).append(results, records)


async def try_problems(
    controller: RolloutController, prompts: Sequence[Prompt], config: EvaluationConfig, first_place: int = 0
) -> tuple[list[ProblemResult], list[dict[str, Any]]]:
    """Sample responses to problems and judge them.

    All evaluations draw with the same seeds: they differ by the weights alone.

    Args:
        controller: Generates and scores.
        prompts: The problems.
        config: How they are tried.
        first_place: Place of the first one among all problems, where these are a part.

    Returns:
        What came of every problem, and the line of every response.

    Raises:
        RunError: See `RolloutController.generate_groups`.
    """
    sampling = evaluation_sampling(controller.sampling, config)
    count = config.samples_per_problem
    groups = await controller.generate_groups(prompts, count, "evaluation", sampling, first_place)
    greedy = []
    if config.greedy:
        most_likely = dataclasses.replace(sampling, greedy=True)
        greedy = await controller.generate_groups(prompts, 1, "evaluation", most_likely, first_place)
    # They would count as the next rollout's.
    controller.scoring.counters()
    results = await problem_results(groups, greedy, count, controller.scoring.pool.same_answer)
    return results, response_records(groups, greedy)


def evaluation_sampling(training: SamplingParameters, config: EvaluationConfig) -> SamplingParameters:
    """How tokens are drawn in evaluation, given how they are drawn in training."""
    return dataclasses.replace(
        training, temperature=config.temperature or training.temperature, top_p=config.top_p or training.top_p
    )


def interval_seed(seed: int) -> int:
    """Seed of the intervals of an evaluation."""
    return derive_seed(seed, "evaluation intervals")


def select_prompts(prompts: Sequence[Prompt], num_prompts: int | None) -> tuple[Prompt, ...]:
    """The first prompts of every source.

    Args:
        prompts: Those of all sources.
        num_prompts: How many of each, or all that a source has; None for all.

    Raises:
        ConfigError: No source has so many.
    """
    if num_prompts is None:
        return tuple(prompts)
    seen: dict[str, int] = {}
    selected = []
    for prompt in prompts:
        seen[prompt.source] = seen.get(prompt.source, 0) + 1
        if seen[prompt.source] <= num_prompts:
            selected.append(prompt)
    largest = max(seen.values(), default=0)
    require(
        num_prompts <= largest,
        field="evaluation.num_prompts",
        value=num_prompts,
        rule=f"must not exceed the {largest} usable prompts of data.evaluation",
        way_out="lower it or give more prompts",
    )
    return tuple(selected)
