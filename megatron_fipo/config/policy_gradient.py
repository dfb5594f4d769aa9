"""What all policy-gradient algorithms share: advantages, averaging, and the terms beside the surrogate."""

import math
from typing import Literal

from megatron_fipo.config.base import config_class, require
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "official_micro_batch"]
KlEstimator = Literal["k1", "k2", "k3"]


@config_class
class PolicyGradientConfig:
    """What every algorithm has: group-relative advantages, averaging, and terms beside the surrogate."""

    updates_per_rollout: int = 8
    """Optimizer steps (mini-batches) that one rollout batch is cut into. FIPO paper, Table 2: 512 / 64 =
    8."""

    aggregation: Aggregation = "token_mean"
    """How token losses are averaged: `token_mean` over all tokens of the mini-batch, `sequence_mean` over
    sequences of their token means, `sequence_sum` over sequences of their token sums divided by
    `length_divisor`, `official_micro_batch` over each micro-batch's tokens and then over samples (the official
    FIPO code; its value depends on how sequences are put into micro-batches)."""

    length_divisor: int | None = None
    """Tokens that `sequence_sum` divides every response's sum by, whatever its length; null with any other
    `aggregation`."""

    normalize_advantages_by_std: bool = True
    """Divide group-relative advantages by the group's standard deviation (FIPO, eq. 1). False: Dr. GRPO."""

    advantage_epsilon: float = 1e-6
    """Added to that standard deviation (reward units)."""

    drop_zero_variance_groups: bool = True
    """Dynamic sampling (DAPO): groups whose rewards are all equal are replaced by fresh ones."""

    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    """What is done about tokens whose probability the rollout engine and the trainer disagree on."""

    reference_kl_coefficient: float = 0.0
    """Weight β of a KL term towards the initial policy, added to every token's loss. 0 leaves out the term
    and the reference policy's forward pass."""

    reference_kl_estimator: KlEstimator = "k3"
    """That term, with d = log π_θ − log π_ref of the token: `k1` is d, `k2` is d²/2, `k3` is exp(−d) − 1 + d
    (GRPO). On fresh samples only k2 has the gradient of KL(π_θ ‖ π_ref); docs/algorithm.md says more."""

    log_ratio_clamp: float = 20.0
    """Log-ratios (nats) are clamped to ± this before anything else. Official code: 20."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        require(
            self.updates_per_rollout >= 1,
            field="updates_per_rollout",
            value=self.updates_per_rollout,
            rule="must be at least 1",
            way_out="use the number of optimizer steps per rollout, 8 in the paper",
        )
        require(
            self.aggregation != "sequence_sum" or (self.length_divisor or 0) >= 1,
            field="length_divisor",
            value=self.length_divisor,
            rule="must be at least 1 with aggregation = sequence_sum, which divides every response's sum by it",
            way_out="use rollout.max_response_tokens",
        )
        require(
            self.aggregation == "sequence_sum" or self.length_divisor is None,
            field="length_divisor",
            value=self.length_divisor,
            rule=f"must be null with aggregation = {self.aggregation}, which does not read it",
            way_out="remove it, or set aggregation = sequence_sum",
        )
        require(
            0 < self.log_ratio_clamp <= 80,
            field="log_ratio_clamp",
            value=self.log_ratio_clamp,
            rule="must lie in (0, 80]: beyond it a ratio overflows in float32",
            way_out="use 20",
        )
        require(
            0 <= self.advantage_epsilon < math.inf,
            field="advantage_epsilon",
            value=self.advantage_epsilon,
            rule="must be finite and not negative",
            way_out="use 1e-6",
        )
        require(
            0 <= self.reference_kl_coefficient < math.inf,
            field="reference_kl_coefficient",
            value=self.reference_kl_coefficient,
            rule="must be finite and not negative: it pulls towards the initial policy",
            way_out="use 0.001, or 0 for no such term",
        )


@config_class
class ClippedSurrogateConfig(PolicyGradientConfig):
    """What the algorithms with PPO's clipped surrogate share: FIPO, DAPO, GRPO, Dr. GRPO and GSPO."""

    clip_low: float = 0.2
    """PPO clip: the ratio's lower bound is 1 − clip_low. DAPO and FIPO: 0.2."""

    clip_high: float = 0.28
    """PPO clip: the ratio's upper bound is 1 + clip_high ("clip-higher"). DAPO and FIPO: 0.28."""

    dual_clip: float | None = 10.0
    """Dual-clip bound c on the ratio: where the advantage is negative, a token's loss is at most c·|Ã|. Null
    turns it off. DAPO and FIPO: 10."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        PolicyGradientConfig.__post_init__(self)
        require(
            0 < self.clip_low < 1,
            field="clip_low",
            value=self.clip_low,
            rule="must lie between 0 and 1: the ratio is kept above 1 − clip_low",
            way_out="use a deviation such as 0.2, not a bound such as 0.8",
        )
        require(
            0 < self.clip_high < math.inf,
            field="clip_high",
            value=self.clip_high,
            rule="must be positive and finite: the ratio is kept below 1 + clip_high",
            way_out="use a deviation such as 0.28",
        )
        require(
            self.dual_clip is None or 1 < self.dual_clip < math.exp(self.log_ratio_clamp),
            field="dual_clip",
            value=self.dual_clip,
            rule="must be above 1 and below exp(log_ratio_clamp), or it could never act",
            way_out="use 10, or null to turn the dual clip off",
        )
