"""The policy-gradient algorithm: FIPO, DAPO or GRPO, with the published settings as presets."""

import dataclasses
import math
from typing import Any, Literal

from megatron_fipo.config.base import ConfigError, config_class, require

Aggregation = Literal["token_mean", "sequence_mean", "official_micro_batch"]
ParticipationMask = Literal["all_tokens", "negative_advantage", "none"]
SafetyMode = Literal["clamp", "reset"]


@config_class
class PolicyGradientConfig:
    """What FIPO, DAPO and GRPO share: group-relative advantages and a clipped surrogate."""

    updates_per_rollout: int = 8
    """Optimizer steps (mini-batches) that one rollout batch is cut into. FIPO paper, Table 2: 512 / 64 =
    8."""

    clip_low: float = 0.2
    """PPO clip: the ratio's lower bound is 1 − clip_low. DAPO and FIPO: 0.2."""

    clip_high: float = 0.28
    """PPO clip: the ratio's upper bound is 1 + clip_high ("clip-higher"). DAPO and FIPO: 0.28."""

    dual_clip: float | None = 10.0
    """Dual-clip bound c on the ratio: where the advantage is negative, a token's loss is at most c·|Ã|. Null
    turns it off. DAPO and FIPO: 10."""

    aggregation: Aggregation = "token_mean"
    """How token losses are averaged: `token_mean` over all tokens of the mini-batch, `sequence_mean` over
    sequences of their token means, `official_micro_batch` over each micro-batch's tokens and then over
    samples (the official FIPO code; its value depends on how sequences are put into micro-batches)."""

    normalize_advantages_by_std: bool = True
    """Divide group-relative advantages by the group's standard deviation (FIPO, eq. 1). False: Dr. GRPO."""

    advantage_epsilon: float = 1e-6
    """Added to that standard deviation (reward units)."""

    drop_zero_variance_groups: bool = True
    """Dynamic sampling (DAPO): groups whose rewards are all equal are replaced by fresh ones."""

    rollout_importance_cap: float | None = None
    """Cap of the truncated importance factor min(π_old / π_rollout, cap) on token losses, against the
    mismatch between trainer and rollout engine. It never enters the Future-KL. Null: no factor."""

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
            0 < self.log_ratio_clamp <= 80,
            field="log_ratio_clamp",
            value=self.log_ratio_clamp,
            rule="must lie in (0, 80]: beyond it a ratio overflows in float32",
            way_out="use 20",
        )
        require(
            self.dual_clip is None or 1 < self.dual_clip < math.exp(self.log_ratio_clamp),
            field="dual_clip",
            value=self.dual_clip,
            rule="must be above 1 and below exp(log_ratio_clamp), or it could never act",
            way_out="use 10, or null to turn the dual clip off",
        )
        require(
            0 <= self.advantage_epsilon < math.inf,
            field="advantage_epsilon",
            value=self.advantage_epsilon,
            rule="must be finite and not negative",
            way_out="use 1e-6",
        )
        require(
            self.rollout_importance_cap is None or self.rollout_importance_cap >= 1,
            field="rollout_importance_cap",
            value=self.rollout_importance_cap,
            rule="must be at least 1",
            way_out="use 2, or null to turn the factor off",
        )


@config_class
class FipoConfig(PolicyGradientConfig):
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

    def __post_init__(self) -> None:
        """Refuse values outside their ranges and settings that make FIPO another algorithm in disguise."""
        PolicyGradientConfig.__post_init__(self)
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


@config_class
class DapoConfig(PolicyGradientConfig):
    """DAPO (arXiv:2503.14476): clip-higher, token mean, dynamic sampling. FIPO without its weights."""

    type: Literal["dapo"] = "dapo"
    """Which algorithm this section describes."""


@config_class
class GrpoConfig(PolicyGradientConfig):
    """GRPO (arXiv:2402.03300) without a KL term: symmetric clip, mean over sequences, no dual clip."""

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


AlgorithmConfig = FipoConfig | DapoConfig | GrpoConfig

_SHARED_BY_PRESETS: dict[str, Any] = {
    "updates_per_rollout": 8,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 10.0,
    "normalize_advantages_by_std": True,
    "advantage_epsilon": 1e-6,
    "drop_zero_variance_groups": True,
    "rollout_importance_cap": None,
    "log_ratio_clamp": 20.0,
    "decay_half_life_tokens": 32.0,
    "influence_clip_low": 1.0,
    "influence_clip_high": 1.2,
    "safety_threshold": 10.0,
    "sequence_drop_max_clipped_tokens": 1,
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


def effective_algorithm(config: AlgorithmConfig) -> str:
    """Say which algorithm a configuration is: every value, and the published setting nearest to it.

    Args:
        config: The algorithm section.

    Returns:
        Lines of text: a heading, then one line a field; fields that differ from the nearest preset (FIPO) or
        from the algorithm's defaults (DAPO, GRPO) show the other value too.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = FIPO_PRESETS if isinstance(config, FipoConfig) else {"defaults": dataclasses.asdict(type(config)())}
    differences = {
        name: [key for key, value in setting.items() if values[key] != value] for name, setting in settings.items()
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    changed = differences[nearest]
    title = f"{config.type}: equals {nearest}"
    if changed:
        title = f"{config.type}: {nearest} except {', '.join(changed)}"
    lines = [title]
    for key, value in values.items():
        if key != "type":
            note = f"  ({nearest}: {settings[nearest][key]})" if key in changed else ""
            lines.append(f"  {key} = {value}{note}")
    return "\n".join(lines)
