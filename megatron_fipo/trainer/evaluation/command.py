"""`megatron-fipo evaluate`: held-out problems with a model folder, without a run."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

from megatron_fipo.config.evaluate import EvaluateConfig
from megatron_fipo.metrics.evaluation_table import evaluation_table
from megatron_fipo.parallel.agreement import on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.runtime.files.json_files import write_json
from megatron_fipo.trainer.evaluation.build import Problems, build_generation, prepare_problems
from megatron_fipo.trainer.evaluation.directory import held_alone
from megatron_fipo.trainer.evaluation.files import EvaluationFiles
from megatron_fipo.trainer.evaluation.problems import evaluation_sampling, interval_seed, try_problems
from megatron_fipo.trainer.evaluation.results import ProblemResult, evaluation_metrics
from megatron_fipo.trainer.same_configuration import require_same_configuration
from megatron_fipo.types import Prompt

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> None:
    """Try all problems, chunk by chunk, go on after an earlier stop, and report; collective over all ranks.

    Rank 0 writes `output_dir` and prints the table. A restart gives bitwise what an uninterrupted evaluation gives.

    Raises:
        ConfigError: An input cannot be used, `output_dir` holds another evaluation, or another process writes to it;
            raised on every rank.
        RunError: A response could not be scored; raised on every rank.
    """
    require_same_configuration(config)
    with ExitStack() as resources:
        problems = on_main_rank(lambda: prepare_problems(config))
        on_main_rank(lambda: resources.enter_context(held_alone(config.output_dir)))
        _evaluate(config, problems)


def _evaluate(config: EvaluateConfig, problems: Problems | None) -> None:
    files = None if problems is None else EvaluationFiles(config.output_dir)
    chunks = [] if problems is None else _chunks(problems.prompts, config)
    results = files.recover([len(chunk) for chunk in chunks]) if files else []
    if broadcast_json(_num_finished(chunks, len(results)) < len(chunks), 0):
        with build_generation(config, problems) as generation:
            finished = generation.generate(lambda controller: _go_on(controller, config, chunks, files, results))
            results = finished or []
    if problems is not None:
        _report(config, problems, results)


def _chunks(prompts: Sequence[Prompt], config: EvaluateConfig) -> list[Sequence[Prompt]]:
    size = max(1, config.chunk_sequences // config.evaluation.samples_per_problem)
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


def _num_finished(chunks: Sequence[Sequence[Prompt]], num_problems: int) -> int:
    """Chunks that make up the first so many problems."""
    count = 0
    while num_problems > 0:
        num_problems -= len(chunks[count])
        count += 1
    return count


async def _go_on(
    controller: RolloutController,
    config: EvaluateConfig,
    chunks: Sequence[Sequence[Prompt]],
    files: EvaluationFiles | None,
    results: list[ProblemResult],
) -> list[ProblemResult]:
    """Try the problems of the chunks that are missing; returns all results."""
    assert files is not None
    total = sum(map(len, chunks))
    if results:
        logger.info("going on after %d of %d problems", len(results), total)
    for chunk in chunks[_num_finished(chunks, len(results)) :]:
        new, records = await try_problems(controller, chunk, config.evaluation, first_place=len(results))
        files.append(new, records)
        results = [*results, *new]
        accuracy = sum(result.num_correct / result.num_samples for result in results) / len(results)
        logger.info("%d of %d problems, accuracy so far %.3f", len(results), total, accuracy)
    return results


def _report(config: EvaluateConfig, problems: Problems, results: Sequence[ProblemResult]) -> None:
    metrics = evaluation_metrics(results, config.evaluation, interval_seed(config.seed))
    if metrics["eval/num_unscored"]:
        logger.warning("%d responses could not be scored; they count as wrong", metrics["eval/num_unscored"])
    sampling = evaluation_sampling(problems.sampling, config.evaluation)
    summary = {
        "model": str(config.model.path),
        "fingerprints": dict(problems.fingerprints),
        "seed": config.seed,
        "samples_per_problem": config.evaluation.samples_per_problem,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_response_tokens": sampling.max_tokens,
        "confidence": config.evaluation.confidence,
        "metrics": metrics,
    }
    write_json(config.output_dir / "evaluation.json", summary)
    print("\n".join(evaluation_table(metrics)), flush=True)
