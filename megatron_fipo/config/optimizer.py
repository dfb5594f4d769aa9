"""Adam, its learning rate over time, and gradient clipping."""

import math
from typing import Literal

from megatron_fipo.config.base import config_class, require


@config_class
class OptimizerConfig:
    """AdamW with a warm-up and a schedule, counted in optimizer steps."""

    learning_rate: float = 1e-6
    """Highest learning rate."""

    min_learning_rate: float = 0.0
    """Learning rate that the schedule decays to."""

    warmup_steps: int = 10
    """Optimizer steps of linear warm-up from 0."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""

    decay_steps: int | None = None
    """Optimizer steps, warm-up included, after which the schedule has reached min_learning_rate; needed unless
    constant."""

    weight_decay: float = 0.1
    """Decoupled weight decay."""

    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""

    adam_beta2: float = 0.98
    """Decay rate of Adam's second moment."""

    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""

    max_grad_norm: float = 1.0
    """Global norm that the gradient is clipped to; infinity for no clipping."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        for field in ("learning_rate", "adam_eps"):
            value = getattr(self, field)
            require(
                0 < value < math.inf,
                field=field,
                value=value,
                rule="must be positive and finite",
                way_out="choose a small positive number, such as 1e-6",
            )
        for field in ("min_learning_rate", "weight_decay", "warmup_steps"):
            value = getattr(self, field)
            require(
                0 <= value < math.inf,
                field=field,
                value=value,
                rule="must be finite and not negative",
                way_out="choose 0 or more",
            )
        require(
            self.max_grad_norm > 0,
            field="max_grad_norm",
            value=self.max_grad_norm,
            rule="must be greater than 0",
            way_out="1.0 is a good value, .inf leaves clipping out",
        )
        for field in ("adam_beta1", "adam_beta2"):
            value = getattr(self, field)
            require(
                0 <= value < 1,
                field=field,
                value=value,
                rule="must lie in [0, 1)",
                way_out="0.9 and 0.98 are good values",
            )
        require(
            self.min_learning_rate <= self.learning_rate,
            field="min_learning_rate",
            value=self.min_learning_rate,
            rule=f"must not exceed learning_rate = {self.learning_rate}",
            way_out="lower it",
        )
        require(
            self.schedule == "constant" or (self.decay_steps or 0) > self.warmup_steps,
            field="decay_steps",
            value=self.decay_steps,
            rule=f'must exceed warmup_steps = {self.warmup_steps} when schedule = "{self.schedule}"',
            way_out="set it to the run's number of optimizer steps (num_steps × algorithm.updates_per_rollout)",
        )
