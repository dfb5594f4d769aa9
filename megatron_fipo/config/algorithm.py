"""The algorithm section: FIPO with its published settings as presets, or one of the baselines."""

import dataclasses
import math
from typing import Any, Literal

from megatron_fipo.config.base import ConfigError, config_class, require
from megatron_fipo.config.baselines import (
    CispoConfig,
    DapoConfig,
    DrGrpoConfig,
    GmpoConfig,
    GrpoConfig,
    GspoConfig,
    SapoConfig,
)
from megatron_fipo.config.policy_gradient import ClippedSurrogateConfig
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig

ParticipationMask = Literal["all_tokens", "negative_advantage", "none"]
SafetyMode = Literal["clamp", "reset"]
InfluenceMode = Literal["future_kl", "shuffled", "constant"]
DecayMode = Literal["constant", "variance"]

SAFE_WEIGHT_FLOOR = 0.8
"""Lower end of the range that `safety_mode = clamp` keeps a weight in; written into the official code."""


@config_class
class FipoConfig(ClippedSurrogateConfig):
    """FIPO (arXiv:2603.19835): advantages weighted by the clipped exponential of the discounted Future-KL."""

    type: Literal["fipo"] = "fipo"
    """Which algorithm this section describes."""

    decay_half_life_tokens: float = 32.0
    """Half-life τ of the Future-KL in tokens: γ = 2^(−1/τ) (eq. 6; the official `decay_rate`, which is not a
    rate). Infinity: no decay."""

    influence_clip_low: float = 1.0
    """Lower bound of the influence weight f itself, not a deviation from 1 (eq. 7). 0: no lower bound. 32B:
    1.0, 7B: 0.8."""

    influence_clip_high: float = 1.2
    """Upper bound of the influence weight f itself (eq. 7). 32B and 7B: 1.2. The official
    `future_kl_clip_ratio = 0` is the pair 0 and 10."""

    participation_mask: ParticipationMask = "all_tokens"
    """Which tokens leave the Future-KL sum (M_k of eq. 5) once their ratio passes `dual_clip`: `all_tokens`
    any such token (official code, paper v2), `negative_advantage` only where the advantage is negative (paper
    v1), `none` no token (the ablation "without filtering")."""

    safety_threshold: float = 10.0
    """Ratio above which a token with negative advantage has its influence weight made safe. 32B: 10, 7B: 3.
    Infinity: never."""

    safety_mode: SafetyMode = "clamp"
    """What is done to that weight: `clamp` to [0.8, 1.0] (official code) or `reset` to 1 (paper)."""

    sequence_drop: bool = True
    """Take a response out of the loss and of its denominator when too many of its tokens hit the dual clip
    with a negative advantage (official code; not in the paper)."""

    sequence_drop_max_clipped_tokens: int = 1
    """Most such tokens a response may have and still be kept. Official code: 1."""

    influence: InfluenceMode = "future_kl"
    """Where the weights come from. Controls: `shuffled` deals the finished weights of each response to its tokens at
    random (does it matter where they are?), `constant` gives every token `constant_influence` (is it more than a
    longer step?)."""

    constant_influence: float = 1.0
    """The weight of every token with `influence = constant`."""

    include_current_token: bool = True
    """Whether the sum starts at the token itself (eq. 4, official code) or, as a control, behind it."""

    self_normalize: bool = False
    """Control: divide the loss by the sum of the weights instead of the number of tokens, so that they can
    only move weight between tokens. A reference KL is divided by it, too. Needs aggregation = token_mean."""

    decay: DecayMode = "constant"
    """`constant` is γ = 2^(−1/τ). Control `variance` (FIPO-K): a token's decay is smaller where the log-ratios
    behind it vary more, with γ as the median of each response."""

    variance_window_tokens: int = 64
    """Positions behind a token over which `decay = variance` takes the variance. FIPO-K: 64."""

    variance_decay_low: float = 0.5
    """Smallest decay of `decay = variance`. FIPO-K: 0.5."""

    variance_decay_high: float = 0.9995
    """Largest decay of `decay = variance`. FIPO-K: 0.9995."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges and settings that make FIPO another algorithm in disguise."""
        ClippedSurrogateConfig.__post_init__(self)
        require(
            self.updates_per_rollout >= 2,
            field="updates_per_rollout",
            value=self.updates_per_rollout,
            rule="FIPO needs at least 2: on a rollout's first mini-batch the policy has not moved, so every "
            "influence weight is exactly 1 and FIPO is DAPO",
            way_out="use 2 or more (8 in the paper), or algorithm type dapo",
        )
        require(
            self.decay_half_life_tokens > 0,
            field="decay_half_life_tokens",
            value=self.decay_half_life_tokens,
            rule="must be positive",
            way_out="use 32, or .inf for no decay",
        )
        require(
            0 <= self.influence_clip_low <= 1,
            field="influence_clip_low",
            value=self.influence_clip_low,
            rule="must lie in [0, 1]: it bounds the weight itself, and an unmoved policy has 1",
            way_out="use 1.0 (32B), 0.8 (7B), or 0 for no lower bound",
        )
        require(
            1 <= self.influence_clip_high < math.inf,
            field="influence_clip_high",
            value=self.influence_clip_high,
            rule="must be at least 1 and finite: it bounds the weight itself, and an unmoved policy has 1",
            way_out="use 1.2, not a deviation such as 0.2",
        )
        require(
            self.safety_threshold >= 1,
            field="safety_threshold",
            value=self.safety_threshold,
            rule="must be at least 1: it is a bound on the ratio",
            way_out="use 10 (32B), 3 (7B), or .inf to turn it off",
        )
        require(
            self.sequence_drop_max_clipped_tokens >= 0,
            field="sequence_drop_max_clipped_tokens",
            value=self.sequence_drop_max_clipped_tokens,
            rule="must not be negative",
            way_out="use 1, the official value",
        )
        require(
            self.dual_clip is not None or not self.sequence_drop,
            field="sequence_drop",
            value=self.sequence_drop,
            rule="counts tokens that hit the dual clip, which is off (dual_clip = null)",
            way_out="set dual_clip = 10, or sequence_drop = false",
        )
        require(
            self.dual_clip is not None or self.participation_mask == "none",
            field="participation_mask",
            value=self.participation_mask,
            rule="needs the dual-clip bound, which is off (dual_clip = null)",
            way_out="set dual_clip = 10, or participation_mask = none",
        )

        self._check_controls()

    def _check_controls(self) -> None:
        require(
            0 < self.constant_influence < math.inf,
            field="constant_influence",
            value=self.constant_influence,
            rule="must be positive and finite: it multiplies every advantage",
            way_out="use the mean weight of the run to be controlled, fipo/influence_weight_mean",
        )
        require(
            not self.self_normalize or self.aggregation == "token_mean",
            field="self_normalize",
            value=self.self_normalize,
            rule=f"needs aggregation = token_mean, whose count of tokens it replaces (it is {self.aggregation})",
            way_out="set aggregation = token_mean",
        )
        require(
            self.variance_window_tokens >= 2,
            field="variance_window_tokens",
            value=self.variance_window_tokens,
            rule="must be at least 2: a variance needs two tokens",
            way_out="use 64",
        )
        require(
            0 < self.variance_decay_low <= self.variance_decay_high <= 1,
            field="variance_decay_low",
            value=self.variance_decay_low,
            rule=f"must lie in (0, variance_decay_high = {self.variance_decay_high}], and that at most at 1",
            way_out="use 0.5 and 0.9995",
        )
        decay = 2.0 ** (-1.0 / self.decay_half_life_tokens)
        require(
            self.decay != "variance" or self.variance_decay_low <= decay <= self.variance_decay_high,
            field="decay_half_life_tokens",
            value=self.decay_half_life_tokens,
            rule=f"gives γ = {decay:.6g}, which decay = variance cannot have as its median: variance_decay_low = "
            f"{self.variance_decay_low} and variance_decay_high = {self.variance_decay_high} bound every decay",
            way_out="widen the bounds, or change the half-life",
        )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "FipoConfig":
        """The published settings `name`, with single fields overridden.

        Args:
            name: `official-32b`, `official-7b` (the released code as its recipes set it), `paper-v1` (arXiv
                v1, 2026-03-20) or `paper-v2` (the later versions).
            overrides: Fields by name.

        Raises:
            ConfigError: There is no such preset or no such field.
        """
        if name not in FIPO_PRESETS:
            raise ConfigError("preset", name, "there is no such preset", f"use {', '.join(FIPO_PRESETS)}")
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in overrides:
            if key not in fields:
                raise ConfigError(key, overrides[key], "no such field", f"use one of {', '.join(fields)}")
        return cls(**{**FIPO_PRESETS[name], **overrides})


AlgorithmConfig = (
    FipoConfig | DapoConfig | GrpoConfig | DrGrpoConfig | GspoConfig | CispoConfig | SapoConfig | GmpoConfig
)

_SHARED_BY_PRESETS: dict[str, Any] = {
    "updates_per_rollout": 8,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 10.0,
    "normalize_advantages_by_std": True,
    "length_divisor": None,
    "advantage_epsilon": 1e-6,
    "drop_zero_variance_groups": True,
    "rollout_correction": RolloutCorrectionConfig(),
    "reference_kl_coefficient": 0.0,
    "reference_kl_estimator": "k3",
    "log_ratio_clamp": 20.0,
    "decay_half_life_tokens": 32.0,
    "influence_clip_low": 1.0,
    "influence_clip_high": 1.2,
    "safety_threshold": 10.0,
    "sequence_drop_max_clipped_tokens": 1,
    "influence": "future_kl",
    "constant_influence": 1.0,
    "include_current_token": True,
    "self_normalize": False,
    "decay": "constant",
    "variance_window_tokens": 64,
    "variance_decay_low": 0.5,
    "variance_decay_high": 0.9995,
}
_OFFICIAL_CODE: dict[str, Any] = {
    **_SHARED_BY_PRESETS,
    "aggregation": "official_micro_batch",
    "participation_mask": "all_tokens",
    "safety_mode": "clamp",
    "sequence_drop": True,
}
_PAPER: dict[str, Any] = {
    **_SHARED_BY_PRESETS,
    "aggregation": "token_mean",
    "participation_mask": "all_tokens",
    "safety_mode": "reset",
    "sequence_drop": False,
}

FIPO_PRESETS: dict[str, dict[str, Any]] = {
    "official-32b": _OFFICIAL_CODE,
    "official-7b": {**_OFFICIAL_CODE, "influence_clip_low": 0.8, "safety_threshold": 3.0},
    "paper-v1": {**_PAPER, "participation_mask": "negative_advantage"},
    "paper-v2": _PAPER,
}
"""Every value of each published setting; docs/algorithm.md says where they come from and how they differ."""
