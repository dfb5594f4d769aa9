"""How held-out problems are tried, and what is reported of them."""

import math
from typing import Literal

from megatron_fipo.config.base import config_class, require


@config_class
class EvaluationConfig:
    """Accuracy on held-out problems: samples of each, how they are drawn, and when."""

    num_prompts: int | None = None
    """Problems tried of every source, from its start, or all that a source has; null tries all."""

    samples_per_problem: int = 1
    """Responses sampled for each problem, the k of Avg@k; 32 is usual for sets of 30 problems."""

    temperature: float | None = None
    """Sampling temperature; null takes rollout.temperature."""

    top_p: float | None = None
    """Nucleus of the sampling distribution; null takes rollout.top_p."""

    greedy: bool = True
    """Also take one greedy response to each problem."""

    pass_at: tuple[int, ...] = ()
    """Report Pass@k at these k too; that at samples_per_problem is always reported."""

    consensus_at: tuple[int, ...] = ()
    """Report Cons@k at these k too; that at samples_per_problem is always reported."""

    confidence: float = 0.95
    """Confidence of the intervals."""

    interval: Literal["problems", "problems_and_samples"] = "problems"
    """What is resampled for the intervals: "problems", taken as drawn from a larger population, or for averages also
    the samples inside each, which is wider."""

    every_steps: int = 0
    """Evaluate during training after every so many steps; 0 only before the first step and after the last."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.num_prompts is None or self.num_prompts >= 1,
            field="num_prompts",
            value=self.num_prompts,
            rule="must be at least 1",
            way_out="leave data.evaluation out to skip evaluation",
        )
        require(
            self.samples_per_problem >= 1,
            field="samples_per_problem",
            value=self.samples_per_problem,
            rule="must be at least 1",
            way_out="1 is enough for hundreds of problems, 32 for a few dozen",
        )
        require(
            self.every_steps >= 0,
            field="every_steps",
            value=self.every_steps,
            rule="must not be negative",
            way_out="0 evaluates before and after the run",
        )
        self._check_sampling()
        for name in ("pass_at", "consensus_at"):
            for k in getattr(self, name):
                require(
                    1 <= k <= self.samples_per_problem,
                    field=name,
                    value=k,
                    rule=f"must lie in [1, samples_per_problem = {self.samples_per_problem}]",
                    way_out="take more samples, or a smaller k",
                )
        require(
            0 < self.confidence < 1,
            field="confidence",
            value=self.confidence,
            rule="must lie in (0, 1)",
            way_out="0.95 is the usual value",
        )

    def _check_sampling(self) -> None:
        require(
            self.temperature is None or 0 < self.temperature < math.inf,
            field="temperature",
            value=self.temperature,
            rule="must be finite and greater than 0",
            way_out="leave it out for the training's, and set greedy for the most likely response",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            field="top_p",
            value=self.top_p,
            rule="must lie in (0, 1]",
            way_out="leave it out for the training's",
        )
