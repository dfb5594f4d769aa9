"""When and how held-out problems are tried."""

from megatron_fipo.config.base import config_class, require


@config_class
class EvaluationConfig:
    """Accuracy on held-out prompts."""

    num_prompts: int = 512
    """Held-out prompts tried, from the start of the set."""

    every_steps: int = 0
    """Evaluate after every so many steps; 0 only before the first step and after the last."""

    greedy: bool = True
    """Also take the greedy accuracy."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.num_prompts >= 1,
            field="num_prompts",
            value=self.num_prompts,
            rule="must be at least 1",
            way_out="leave data.evaluation out to skip evaluation",
        )
        require(
            self.every_steps >= 0,
            field="every_steps",
            value=self.every_steps,
            rule="must not be negative",
            way_out="0 evaluates before and after the run",
        )
