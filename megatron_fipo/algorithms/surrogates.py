"""What each algorithm minimises on a token, given ratios and advantages.

A loss with one ratio a response (GSPO, GMPO) is written token by token: its value is the response's on every token,
and its gradient reaches every token through that token's own log-probability. The mean over a response's tokens is
then the response's loss with its exact gradient, and no gradient crosses context-parallel ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config.baselines import CispoConfig, GmpoConfig, SapoConfig
from megatron_fipo.config.policy_gradient import ClippedSurrogateConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """A micro-batch's token losses on one rank.

    Attributes:
        losses: [t] with gradient, to be minimised.
        clipped_low: [t] bool, tokens that a lower bound on the ratio has cut off; None where there is no such bound.
        clipped_high: [t] bool, the same for an upper bound.
    """

    losses: Tensor
    clipped_low: Tensor | None = None
    clipped_high: Tensor | None = None


def clipped_surrogate(ratio: Tensor, advantages: Tensor, config: ClippedSurrogateConfig) -> Surrogate:
    """Negated PPO surrogate −min(r·A, clip(r)·A), and for A < 0 at most the dual-clip bound −c·A (FIPO, eq. 8).

    Args:
        ratio: [t], of the token or of its response, with gradient.
        advantages: [t], already weighted (Ã).
        config: Clip bounds.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if config.dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * config.dual_clip), losses)
    return Surrogate(
        losses=losses,
        clipped_low=(advantages < 0) & (ratio.detach() < low),
        clipped_high=(advantages > 0) & (ratio.detach() > high),
    )


def sequence_ratio(log_ratio: Tensor, mean_log_ratio: Tensor) -> Tensor:
    """GSPO's ratio of a response, exp(mean Δ), with the gradient of each token's own Δ (arXiv:2507.18071, eq. 14).

    Args:
        log_ratio: [t], Δ with gradient.
        mean_log_ratio: [t], mean of Δ over the token's response, without gradient.
    """
    # The difference first: it is exactly 0, where Δ added to the mean would round it, differently on every token.
    return (mean_log_ratio + (log_ratio - log_ratio.detach())).exp()


def truncated_reinforce(log_probs: Tensor, ratio: Tensor, advantages: Tensor, config: CispoConfig) -> Surrogate:
    """CISPO: −sg(clip(r, low, high))·A·log π_θ (arXiv:2506.13585, eq. 4).

    Args:
        log_probs: [t] with gradient, finite.
        ratio: [t].
        advantages: [t].
        config: Bounds of the weight.
    """
    ratio = ratio.detach()
    weights = ratio.clamp(config.weight_low, config.weight_high)
    return Surrogate(
        losses=-weights * advantages * log_probs,
        clipped_low=ratio < config.weight_low if config.weight_low > 0 else None,
        clipped_high=ratio > config.weight_high,
    )


def soft_gate(ratio: Tensor, advantages: Tensor, config: SapoConfig) -> Surrogate:
    """SAPO: −A·σ(τ(r − 1))·4/τ, τ by the sign of the advantage (arXiv:2511.20347).

    Args:
        ratio: [t] with gradient.
        advantages: [t].
        config: Temperatures.
    """
    temperature = torch.where(
        advantages > 0,
        torch.full_like(advantages, config.temperature_positive),
        torch.full_like(advantages, config.temperature_negative),
    )
    return Surrogate(losses=-advantages * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature)


def clipped_log_ratio(log_ratio: Tensor, advantages: Tensor, config: GmpoConfig) -> Tensor:
    """GMPO's log-ratio of a token: bounded above where A > 0 and below where A < 0 (arXiv:2507.20673, eq. 4).

    Args:
        log_ratio: [t] with gradient.
        advantages: [t].
        config: Bounds.
    """
    return torch.where(
        advantages > 0, log_ratio.clamp(max=config.log_clip_high), log_ratio.clamp(min=-config.log_clip_low)
    )


def geometric_mean(clipped: Tensor, mean_clipped: Tensor, log_ratio: Tensor, advantages: Tensor) -> Surrogate:
    """GMPO: −A·exp(mean of the response's clipped log-ratios).

    Args:
        clipped: [t], from `clipped_log_ratio`, with gradient.
        mean_clipped: [t], its mean over the token's response, without gradient.
        log_ratio: [t], before the clip.
        advantages: [t].
    """
    change = clipped - clipped.detach()
    log_ratio = log_ratio.detach()
    return Surrogate(
        losses=-advantages * mean_clipped.exp() * (1 + change),
        clipped_low=(advantages < 0) & (clipped.detach() > log_ratio),
        clipped_high=(advantages > 0) & (clipped.detach() < log_ratio),
    )


def reference_kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: str, clamp: float) -> Tensor:
    """KL term towards a reference policy, with d = log π_θ − log π_ref kept within ± `clamp`.

    Args:
        log_probs: [t] with gradient.
        reference_log_probs: [t].
        estimator: "k1" is d, "k2" is d²/2, "k3" is exp(−d) − 1 + d (J. Schulman, "Approximating KL Divergence", 2020).
        clamp: In nats.

    Returns:
        [t] with gradient.
    """
    difference = (log_probs - reference_log_probs.detach()).clamp(-clamp, clamp)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference
