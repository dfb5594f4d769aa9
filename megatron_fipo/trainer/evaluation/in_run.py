"""Accuracy on held-out problems during a run."""

from megatron_fipo.parallel.agreement import stop_comes_first
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

    Collective over all ranks. `evaluations/step_N/` in the run directory is written too.

    Returns:
        Metrics on rank 0, see `evaluation_metrics`; nothing elsewhere.

    Raises:
        RunError: A response could not be scored, or the run directory is gone.
    """
    data = run.config.data
    if run.rollout is None or data is None or not data.has_evaluation or run.config.mode != "train":
        return {}
    run.require_directory()
    with run.timer.phase("evaluation"), stop_comes_first(run.stop):
        return run.rollout.evaluate(None if run.directory is None else run.directory.evaluation(step))
