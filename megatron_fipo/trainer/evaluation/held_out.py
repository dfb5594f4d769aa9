"""The held-out problems of a run, tried with whatever the engine's weights are."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told
from megatron_fipo.trainer.evaluation.files import EvaluationFiles
from megatron_fipo.trainer.evaluation.problems import interval_seed, try_problems
from megatron_fipo.trainer.evaluation.results import evaluation_metrics
from megatron_fipo.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutProblems:
    """What a run is evaluated on.

    Attributes:
        prompts: The problems.
        config: How they are tried.
        seed: The run's.
    """

    prompts: Sequence[Prompt]
    config: EvaluationConfig
    seed: int

    async def evaluate(self, controller: RolloutController, folder: Path) -> dict[str, float]:
        """Try all problems and write what came of them.

        Args:
            controller: Generates and scores.
            folder: Where the files go; what lies there is removed.

        Returns:
            See `evaluation_metrics`.

        Raises:
            RunError: The files cannot be written, or see `RolloutController.generate_groups`.
        """
        results, records = await try_problems(controller, self.prompts, self.config)
        # A step that is done again after a crash is evaluated again.
        shutil.rmtree(folder, ignore_errors=True)
        with disk_errors_told(folder, "cannot be written", RunError):
            folder.mkdir(parents=True)
            EvaluationFiles(folder).append(results, records)
        return evaluation_metrics(results, self.config, interval_seed(self.seed))
