"""Tries problems with an engine: which ones, how responses are drawn, and what came of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_fipo.config.base import require
from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.engine import SamplingParameters
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.trainer.evaluation.results import ProblemResult, problem_results, response_records
from megatron_fipo.types import Prompt


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
