"""AdamW for the CPU with the interface of the fused Adam that megatron-core expects.

megatron-core's own fallback, `torch.optim.AdamW`, keeps a step count per parameter, which its distributed-checkpoint
code cannot restore; the fused Adam keeps one per parameter group. This class does the same, so that CPU checkpoints
have the form that GPU checkpoints have.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class CpuFusedAdam(torch.optim.Optimizer):
    """AdamW (decoupled weight decay, arXiv:1711.05101) with the step count in the parameter group.

    Args:
        params: Parameters or parameter groups, float32.
        lr: Learning rate.
        bias_correction: Divide the moments by 1 − βᵗ; must be true.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        adam_w_mode: True for decoupled weight decay, false to add the decay to the gradient.
        weight_decay: Decay coefficient.

    Raises:
        ValueError: `bias_correction` is false.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **_unused: Any,
    ) -> None:
        if not bias_correction:
            raise ValueError("bias_correction = False: PyTorch's kernel always corrects; leave it on")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            group["step"] = int(group.get("step", 0)) + 1
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        rule = adamw if self.adam_w_mode else adam
        # The fused kernel makes no copy of anything; it wants a step count for each parameter.
        rule(
            parameters,
            [gradient for parameter in parameters if (gradient := parameter.grad) is not None],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [torch.tensor(group["step"] - 1.0) for _ in parameters],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install() -> None:
    """Make megatron-core build this optimizer where it would fall back to `torch.optim.AdamW`."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    for module in (megatron_optimizer, distrib_optimizer):
        module.Adam = CpuFusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
