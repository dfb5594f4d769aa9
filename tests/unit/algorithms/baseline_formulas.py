"""The published losses of the baselines, one response at a time in NumPy, with their gradients; and batches for them.

They share no code with the package; only values are read from a configuration.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_fipo.algorithms.losses import PolicyLoss, policy_loss_on_rows
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import (
    CispoConfig,
    DapoConfig,
    DrGrpoConfig,
    GmpoConfig,
    GrpoConfig,
    GspoConfig,
    SapoConfig,
)

type Rows = dict[str, torch.Tensor]

BASELINES: dict[str, AlgorithmConfig] = {
    "grpo": GrpoConfig(),
    "dapo": DapoConfig(),
    "dr_grpo": DrGrpoConfig(length_divisor=7),
    "gspo": GspoConfig(),
    "gspo, wide clip": GspoConfig(clip_low=0.2, clip_high=0.28, dual_clip=1.5),
    "cispo": CispoConfig(),
    "cispo, tight": CispoConfig(weight_low=0.7, weight_high=1.3),
    "sapo": SapoConfig(),
    "sapo, steep": SapoConfig(temperature_positive=3.0, temperature_negative=5.0),
    "gmpo": GmpoConfig(),
    "gmpo, lopsided": GmpoConfig(log_clip_low=0.1, log_clip_high=0.6),
}
ALGORITHMS: dict[str, AlgorithmConfig] = {**BASELINES, "fipo": FipoConfig()}


@dataclass(kw_only=True)
class ResponseLoss:
    """A response's share of the loss before the division by the number of responses (or of tokens)."""

    loss: float
    gradient: np.ndarray


def rows(seed: int, spread: float, count: int = 5, length: int = 12, dtype: torch.dtype = torch.float64) -> Rows:
    """Ragged responses of both signs, one of them zero, some with gaps; NaN wherever nothing may be read."""
    draws = np.random.default_rng(seed)
    mask = np.zeros((count, length), dtype=bool)
    for row in mask:
        first = draws.integers(0, length)
        row[first : draws.integers(first + 1, length + 1)] = True
        row[first + 1 :] &= draws.random(length - first - 1) < 0.9
    old = np.where(mask, -draws.exponential(1.0, mask.shape), math.nan)
    new = old + spread * draws.standard_normal(mask.shape)
    advantages = np.where(mask, draws.choice([-1.0, 1.0], (count, 1)) * draws.exponential(1.0, (count, 1)), math.nan)
    if count > 3:
        advantages[3][mask[3]] = 0.0
    values = {"log_probs": new, "old_log_probs": old, "advantages": advantages}
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    tensors["log_probs"].requires_grad_()
    return {**tensors, "response_mask": torch.from_numpy(mask)}


def loss_and_gradient(batch: Rows, config: AlgorithmConfig, **more: torch.Tensor) -> tuple[PolicyLoss, torch.Tensor]:
    result = policy_loss_on_rows(**batch, config=config, **more)
    (gradient,) = torch.autograd.grad(result.loss, batch["log_probs"])
    return result, gradient


def published_loss(batch: Rows, config: AlgorithmConfig) -> tuple[float, np.ndarray]:
    """Loss of a batch by the published formula, and its gradient [B, T]."""
    formula = FORMULAS[type(config)]
    mask = batch["response_mask"].numpy()
    values = {name: batch[name].detach().numpy() for name in ("log_probs", "old_log_probs", "advantages")}
    loss, gradient = 0.0, np.zeros(mask.shape)
    for row, chosen in enumerate(mask):
        new, old, advantages = (values[name][row][chosen] for name in values)
        if chosen.any():
            part = formula(new - old, new, float(advantages[0]), config)
            loss += part.loss
            gradient[row][chosen] = part.gradient
    divisor = mask.sum() if config.aggregation == "token_mean" else mask.any(axis=1).sum()
    return loss / divisor, gradient / divisor


def _ppo(ratio: np.ndarray, advantage: float, config: AlgorithmConfig) -> tuple[np.ndarray, np.ndarray]:
    """−min(r·A, clip(r)·A), at most −c·A for A < 0, and its derivative by log r."""
    plain = -ratio * advantage
    clipped = -np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage
    losses, gradients = np.maximum(plain, clipped), np.where(plain >= clipped, plain, 0.0)
    if config.dual_clip is not None and advantage < 0:
        bound = -config.dual_clip * advantage
        gradients = np.where(losses > bound, 0.0, gradients)
        losses = np.minimum(losses, bound)
    return losses, gradients


def _token_ppo(log_ratio: np.ndarray, log_probs: np.ndarray, advantage: float, config: AlgorithmConfig) -> ResponseLoss:
    losses, gradients = _ppo(np.exp(log_ratio), advantage, config)
    scale = {"token_mean": 1.0, "sequence_mean": 1 / len(losses), "sequence_sum": 1 / (config.length_divisor or 1)}
    factor = scale[config.aggregation]
    return ResponseLoss(loss=float(losses.sum()) * factor, gradient=gradients * factor)


def _gspo(log_ratio: np.ndarray, log_probs: np.ndarray, advantage: float, config: GspoConfig) -> ResponseLoss:
    ratio = (np.exp(np.sum(log_ratio))) ** (1 / len(log_ratio))
    loss, gradient = _ppo(np.array([ratio]), advantage, config)
    return ResponseLoss(loss=float(loss[0]), gradient=np.full(len(log_ratio), gradient[0] / len(log_ratio)))


def _cispo(log_ratio: np.ndarray, log_probs: np.ndarray, advantage: float, config: CispoConfig) -> ResponseLoss:
    weights = np.minimum(np.maximum(np.exp(log_ratio), config.weight_low), config.weight_high)
    return ResponseLoss(loss=-float(np.sum(weights * log_probs)) * advantage, gradient=-weights * advantage)


def _sapo(log_ratio: np.ndarray, log_probs: np.ndarray, advantage: float, config: SapoConfig) -> ResponseLoss:
    temperature = config.temperature_positive if advantage > 0 else config.temperature_negative
    ratio = np.exp(log_ratio)
    gate = 1 / (1 + np.exp(-temperature * (ratio - 1)))
    return ResponseLoss(
        loss=-advantage * float(np.mean(4 / temperature * gate)),
        gradient=-advantage * 4 * gate * (1 - gate) * ratio / len(ratio),
    )


def _gmpo(log_ratio: np.ndarray, log_probs: np.ndarray, advantage: float, config: GmpoConfig) -> ResponseLoss:
    if advantage == 0:
        return ResponseLoss(loss=0.0, gradient=np.zeros(len(log_ratio)))
    ratio = np.exp(log_ratio)
    clipped = np.clip(ratio, math.exp(-config.log_clip_low), math.exp(config.log_clip_high))
    terms = np.minimum(ratio * advantage, clipped * advantage)
    loss = -math.copysign(float(np.prod(np.abs(terms)) ** (1 / len(terms))), advantage)
    return ResponseLoss(loss=loss, gradient=np.where(terms == ratio * advantage, loss / len(terms), 0.0))


FORMULAS: dict[type, Callable[..., ResponseLoss]] = {
    GrpoConfig: _token_ppo,
    DapoConfig: _token_ppo,
    DrGrpoConfig: _token_ppo,
    GspoConfig: _gspo,
    CispoConfig: _cispo,
    SapoConfig: _sapo,
    GmpoConfig: _gmpo,
}
