"""The algorithms that FIPO is compared with, each with its published values as defaults."""

import math
from typing import Literal

from megatron_fipo.config.base import config_class, require
from megatron_fipo.config.policy_gradient import Aggregation, ClippedSurrogateConfig, PolicyGradientConfig


@config_class
class DapoConfig(ClippedSurrogateConfig):
    """DAPO (arXiv:2503.14476): clip-higher, token mean, dynamic sampling. FIPO without its weights."""

    type: Literal["dapo"] = "dapo"
    """Which algorithm this section describes."""


@config_class
class GrpoConfig(ClippedSurrogateConfig):
    """GRPO (arXiv:2402.03300): symmetric clip, mean over sequences, no dual clip; its KL term is off."""

    type: Literal["grpo"] = "grpo"
    """Which algorithm this section describes."""

    clip_high: float = 0.2
    """PPO clip: the ratio's upper bound is 1 + clip_high. GRPO: 0.2."""

    dual_clip: float | None = None
    """Dual-clip bound c on the ratio: where the advantage is negative, a token's loss is at most c·|A|. GRPO:
    off."""

    aggregation: Aggregation = "sequence_mean"
    """How token losses are averaged. GRPO: over sequences of their token means."""

    drop_zero_variance_groups: bool = False
    """Dynamic sampling: groups whose rewards are all equal are replaced by fresh ones. GRPO: off."""


@config_class
class DrGrpoConfig(ClippedSurrogateConfig):
    """Dr. GRPO (arXiv:2503.20783): GRPO without its two normalisations, by length and by standard deviation."""

    type: Literal["dr_grpo"] = "dr_grpo"
    """Which algorithm this section describes."""

    clip_high: float = 0.2
    """PPO clip: the ratio's upper bound is 1 + clip_high. Dr. GRPO: 0.2."""

    dual_clip: float | None = None
    """Dual-clip bound c on the ratio: where the advantage is negative, a token's loss is at most c·|A|. Dr.
    GRPO: off."""

    aggregation: Aggregation = "sequence_sum"
    """How token losses are averaged. Dr. GRPO: sums over responses, divided by one constant."""

    length_divisor: int
    """Tokens that every response's sum is divided by, whatever its length: rollout.max_response_tokens in the
    authors' code."""

    normalize_advantages_by_std: bool = False
    """Divide group-relative advantages by the group's standard deviation. Dr. GRPO: off."""

    drop_zero_variance_groups: bool = False
    """Dynamic sampling: groups whose rewards are all equal are replaced by fresh ones. Dr. GRPO: off."""


@config_class
class GspoConfig(ClippedSurrogateConfig):
    """GSPO (arXiv:2507.18071): one ratio a response, the geometric mean of its tokens' ratios."""

    type: Literal["gspo"] = "gspo"
    """Which algorithm this section describes."""

    clip_low: float = 3e-4
    """PPO clip: the response's ratio is kept above 1 − clip_low. GSPO: 3e-4."""

    clip_high: float = 4e-4
    """PPO clip: the response's ratio is kept below 1 + clip_high. GSPO: 4e-4."""

    dual_clip: float | None = None
    """Dual-clip bound c on the response's ratio: where the advantage is negative, the loss is at most c·|A|.
    GSPO: off."""

    aggregation: Aggregation = "sequence_mean"
    """How token losses are averaged. GSPO: over sequences of their token means."""

    drop_zero_variance_groups: bool = False
    """Dynamic sampling: groups whose rewards are all equal are replaced by fresh ones. GSPO: off."""


@config_class
class CispoConfig(PolicyGradientConfig):
    """CISPO (arXiv:2506.13585): log-probabilities weighted by a truncated ratio that carries no gradient."""

    type: Literal["cispo"] = "cispo"
    """Which algorithm this section describes."""

    weight_low: float = 0.0
    """Lower bound of the weight, the ratio itself. CISPO: none."""

    weight_high: float = 5.0
    """Upper bound of the weight, the ratio itself. The paper does not state its own; 5 is this project's choice."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        PolicyGradientConfig.__post_init__(self)
        require(
            0 <= self.weight_low <= 1,
            field="weight_low",
            value=self.weight_low,
            rule="must lie in [0, 1]: it bounds the ratio itself, and an unmoved policy has 1",
            way_out="use 0 for no lower bound",
        )
        require(
            1 <= self.weight_high < math.inf,
            field="weight_high",
            value=self.weight_high,
            rule="must be at least 1 and finite: it bounds the ratio itself, and an unmoved policy has 1",
            way_out="use 5, not a deviation such as 0.28",
        )


@config_class
class SapoConfig(PolicyGradientConfig):
    """SAPO (arXiv:2511.20347): a smooth gate around a ratio of 1 in the place of the clip."""

    type: Literal["sapo"] = "sapo"
    """Which algorithm this section describes."""

    temperature_positive: float = 1.0
    """Steepness of the gate where the advantage is positive. SAPO: 1.0."""

    temperature_negative: float = 1.05
    """Steepness of the gate where the advantage is not positive. SAPO: 1.05."""

    aggregation: Aggregation = "sequence_mean"
    """How token losses are averaged. SAPO: over sequences of their token means."""

    drop_zero_variance_groups: bool = False
    """Dynamic sampling: groups whose rewards are all equal are replaced by fresh ones. SAPO: off."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        PolicyGradientConfig.__post_init__(self)
        for field in ("temperature_positive", "temperature_negative"):
            require(
                0 < getattr(self, field) < math.inf,
                field=field,
                value=getattr(self, field),
                rule="must be positive and finite: it is the steepness of the gate",
                way_out="use a value near 1",
            )


@config_class
class GmpoConfig(PolicyGradientConfig):
    """GMPO (arXiv:2507.20673): the geometric mean of a response's clipped ratios, times its advantage."""

    type: Literal["gmpo"] = "gmpo"
    """Which algorithm this section describes."""

    log_clip_low: float = 0.4
    """Where the advantage is negative, a token's log-ratio is kept above −log_clip_low (nats). GMPO: 0.4."""

    log_clip_high: float = 0.4
    """Where the advantage is positive, a token's log-ratio is kept below log_clip_high (nats). GMPO: 0.4."""

    aggregation: Aggregation = "sequence_mean"
    """How token losses are averaged. GMPO: over sequences of their token means."""

    drop_zero_variance_groups: bool = False
    """Dynamic sampling: groups whose rewards are all equal are replaced by fresh ones. GMPO: off."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        PolicyGradientConfig.__post_init__(self)
        for field in ("log_clip_low", "log_clip_high"):
            require(
                0 < getattr(self, field) < math.inf,
                field=field,
                value=getattr(self, field),
                rule="must be positive and finite: it bounds the size of a log-ratio",
                way_out="use 0.4",
            )
