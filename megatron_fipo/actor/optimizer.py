"""The actor's optimizer and learning-rate schedule, on megatron-core's."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.platform.host_memory import require_resident


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimizer step did.

    Attributes:
        applied: Whether the weights changed.
        grad_norm: Global norm of the gradient before clipping.
    """

    applied: bool
    grad_norm: float


class ActorOptimizer:
    """Adam over this rank's model chunks, with clipping, warm-up and schedule.

    Args:
        chunks: Model chunks wrapped for data parallelism.
        config: Optimizer settings.
        bf16: Whether the chunks are bfloat16, with float32 main weights.
    """

    def __init__(self, chunks: list[Any], config: OptimizerConfig, bf16: bool) -> None:
        self.chunks = chunks
        self.config = config
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.learning_rate,
                min_lr=config.min_learning_rate,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.max_grad_norm,
                bf16=bf16,
                use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
            ),
            chunks,
        )
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=config.decay_steps or config.warmup_steps + 1,
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        # megatron-core's schedule starts at warm-up step 0 with a rate of 0; step 1 is the first useful one.
        if config.warmup_steps:
            self.schedule.step(increment=1)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def num_steps(self) -> int:
        """Updates that Adam has made; 0 on a rank without any weights of its own."""
        groups = [group for part in self.parts if part.optimizer is not None for group in part.optimizer.param_groups]
        return max((int(group.get("step", 0)) for group in groups), default=0)

    def set_progress(self, num_steps: int, schedule_steps: int) -> None:
        """Go on from another optimizer's progress; its moments and weights are set elsewhere.

        Args:
            num_steps: Its `num_steps`, from a rank that has weights.
            schedule_steps: Steps of its schedule.
        """
        for part in self.parts:
            if part.optimizer is not None:
                for group in part.optimizer.param_groups:
                    group["step"] = num_steps
        self.schedule.num_steps = schedule_steps
        self.schedule.step(increment=0)

    @property
    def parts(self) -> list[Any]:
        """megatron-core's optimizers, those for experts apart."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def state_tensors(self) -> Iterator[Tensor]:
        """The weights that Adam steps, which may be the model's own, and its moments."""
        for part in self.parts:
            # A rank without any such weights has a part without an optimizer.
            if part.optimizer is not None:
                for group in part.optimizer.param_groups:
                    yield from group["params"]
                for state in part.optimizer.state.values():
                    yield from (each for each in state.values() if isinstance(each, Tensor))

    def zero_grad(self) -> None:
        """Forget all gradients.

        Raises:
            RunError: The gradients are off the device.
        """
        require_resident(gradient_buffers(self.chunks), "the actor's gradients")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, apply: bool = True) -> StepOutcome:
        """Clip the reduced gradient and update the weights; a gradient that is not finite changes nothing.

        The schedule advances only with an applied step.

        Args:
            apply: Whether to change anything at all; false measures the gradient alone.

        Raises:
            RunError: The optimizer's state is off the device.
        """
        require_resident(self.state_tensors(), "the optimizer's states")
        found_infinite = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if found_infinite or not math.isfinite(grad_norm) or not apply:
            return StepOutcome(applied=False, grad_norm=grad_norm)
        for part in self.parts:
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, self.config.max_grad_norm, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.schedule.step(increment=1)
        return StepOutcome(applied=True, grad_norm=grad_norm)


def gradient_buffers(chunks: Sequence[Any]) -> list[Tensor]:
    """Buffers that hold the gradients of all chunks, those of experts included."""
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return [tensor for buffer in buffers for tensor in (buffer.grad_data, *buffer.extra_main_grads)]
