"""Accuracy on held-out problems during a run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.trainer.evaluation.files import EvaluationFiles
from megatron_fipo.trainer.evaluation.problems import interval_seed, try_problems
from megatron_fipo.trainer.evaluation.results import ProblemResult, evaluation_metrics
from megatron_fipo.trainer.state import Run


def evaluate_when_due(run: Run, step: int) -> dict[str, float]:
    """Evaluate before the first step, after the last, and every `evaluation.every_steps`.

    Returns:
        See `evaluate`; nothing when none is due.
    """
    every = run.config.evaluation.every_steps
    due = step in (0, run.config.num_steps) or (every > 0 and step % every == 0)
    return evaluate(run, step) if due else {}


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Evaluate, if there is anything to evaluate with.

    Collective over all ranks. Rank 0 also writes `evaluations/step_N/` in the run directory.

    Returns:
        Metrics on rank 0, see `evaluation_metrics`; nothing elsewhere.

    Raises:
        RunError: A response could not be scored.
    """
    data = run.config.data
    if run.rollout is None or data is None or not data.has_evaluation or run.config.mode != "train":
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
