import dataclasses
import math

import pytest

from megatron_fipo.config.algorithm import FIPO_PRESETS, FipoConfig
from megatron_fipo.config.algorithm_card import effective_algorithm
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.baselines import (
    CispoConfig,
    DapoConfig,
    DrGrpoConfig,
    GmpoConfig,
    GrpoConfig,
    GspoConfig,
    SapoConfig,
)
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig

# What no published setting changes.
SILENT = {
    "length_divisor": None,
    "reference_kl_coefficient": 0.0,
    "reference_kl_estimator": "k3",
    "influence": "future_kl",
    "constant_influence": 1.0,
    "include_current_token": True,
    "self_normalize": False,
    "decay": "constant",
    "variance_window_tokens": 64,
    "variance_decay_low": 0.5,
    "variance_decay_high": 0.9995,
}
OFFICIAL_32B = {
    **SILENT,
    "updates_per_rollout": 8,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 10.0,
    "aggregation": "official_micro_batch",
    "normalize_advantages_by_std": True,
    "advantage_epsilon": 1e-6,
    "drop_zero_variance_groups": True,
    "rollout_correction": {"kind": "none", "level": "token", "low": 0.0, "high": 2.0},
    "log_ratio_clamp": 20.0,
    "type": "fipo",
    "decay_half_life_tokens": 32.0,
    "influence_clip_low": 1.0,
    "influence_clip_high": 1.2,
    "participation_mask": "all_tokens",
    "safety_threshold": 10.0,
    "safety_mode": "clamp",
    "sequence_drop": True,
    "sequence_drop_max_clipped_tokens": 1,
}
PAPER_V2 = {**OFFICIAL_32B, "aggregation": "token_mean", "safety_mode": "reset", "sequence_drop": False}
PUBLISHED = {
    "official-32b": OFFICIAL_32B,
    "official-7b": {**OFFICIAL_32B, "influence_clip_low": 0.8, "safety_threshold": 3.0},
    "paper-v1": {**PAPER_V2, "participation_mask": "negative_advantage"},
    "paper-v2": PAPER_V2,
}


@pytest.mark.parametrize("name", FIPO_PRESETS)
def test_presets_are_the_published_values(name):
    assert dataclasses.asdict(FipoConfig.preset(name)) == PUBLISHED[name]


def test_every_preset_sets_every_field():
    fields = {field.name for field in dataclasses.fields(FipoConfig)} - {"type"}
    assert list(FIPO_PRESETS) == list(PUBLISHED)
    for values in FIPO_PRESETS.values():
        assert set(values) == fields


def test_preset_with_overrides():
    config = FipoConfig.preset("official-7b", decay_half_life_tokens=128.0)
    assert dataclasses.asdict(config) == {**PUBLISHED["official-7b"], "decay_half_life_tokens": 128.0}


def test_unknown_preset_and_unknown_field_are_refused():
    with pytest.raises(ConfigError, match=r"preset = '?official-8b'?: .*official-7b"):
        FipoConfig.preset("official-8b")
    with pytest.raises(ConfigError, match=r"decay_rate = 32: no such field; .*decay_half_life_tokens"):
        FipoConfig.preset("official-7b", decay_rate=32)


def test_defaults():
    default = dataclasses.asdict(FipoConfig())
    assert default == {**OFFICIAL_32B, "aggregation": "token_mean"}
    dapo = dataclasses.asdict(DapoConfig())
    assert dapo == {**{key: default[key] for key in dapo}, "type": "dapo"}
    assert dataclasses.asdict(GrpoConfig()) == {
        **dapo,
        "type": "grpo",
        "clip_high": 0.2,
        "dual_clip": None,
        "aggregation": "sequence_mean",
        "drop_zero_variance_groups": False,
    }
    assert (GspoConfig().clip_low, GspoConfig().clip_high, GspoConfig().aggregation) == (3e-4, 4e-4, "sequence_mean")
    assert (CispoConfig().weight_low, CispoConfig().weight_high, CispoConfig().aggregation) == (0.0, 5.0, "token_mean")
    assert (SapoConfig().temperature_positive, SapoConfig().temperature_negative) == (1.0, 1.05)
    assert (GmpoConfig().log_clip_low, GmpoConfig().log_clip_high) == (0.4, 0.4)
    dr_grpo = DrGrpoConfig(length_divisor=512)
    assert (dr_grpo.aggregation, dr_grpo.normalize_advantages_by_std) == ("sequence_sum", False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"updates_per_rollout": 0}, "at least 1"),
        ({"clip_low": 0.0}, "between 0 and 1"),
        ({"clip_low": 1.0}, "between 0 and 1"),
        ({"clip_high": 0.0}, "positive and finite"),
        ({"clip_high": math.nan}, "positive and finite"),
        ({"dual_clip": 1.0}, "above 1"),
        ({"dual_clip": 1e9}, "below exp"),
        ({"advantage_epsilon": -1e-6}, "not negative"),
        ({"log_ratio_clamp": 0.0}, r"\(0, 80\]"),
        ({"log_ratio_clamp": 1e6}, r"\(0, 80\]"),
        ({"reference_kl_coefficient": -0.1}, "not negative"),
        ({"reference_kl_coefficient": math.inf}, "finite"),
        ({"length_divisor": 512}, "must be null with aggregation"),
    ],
)
@pytest.mark.parametrize("section", [FipoConfig, DapoConfig, GrpoConfig])
def test_values_out_of_range_are_refused(section, values, message):
    (field,) = values
    with pytest.raises(ConfigError, match=message) as error:
        section(**values)
    assert error.value.field == field
    assert error.value.way_out


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"kind": "mask", "low": -0.1}, "low", r"\[0, 1\]"),
        ({"kind": "mask", "low": 1.1}, "low", r"\[0, 1\]"),
        ({"kind": "mask", "low": math.nan}, "low", r"\[0, 1\]"),
        ({"kind": "truncate", "high": 0.9}, "high", "at least 1 and finite"),
        ({"kind": "mask", "high": math.inf}, "high", "at least 1 and finite"),
        ({"kind": "truncate", "low": 0.5}, "low", "must be 0 with kind = truncate"),
    ],
)
def test_bounds_of_a_correction_that_agreement_would_break_are_refused(values, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        RolloutCorrectionConfig(**values)
    assert error.value.field == field
    assert error.value.way_out


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"updates_per_rollout": 1}, "updates_per_rollout", "every influence weight is exactly 1"),
        ({"decay_half_life_tokens": 0.0}, "decay_half_life_tokens", "positive"),
        ({"decay_half_life_tokens": math.nan}, "decay_half_life_tokens", "positive"),
        ({"influence_clip_low": -0.1}, "influence_clip_low", r"\[0, 1\]"),
        ({"influence_clip_low": 1.1}, "influence_clip_low", r"\[0, 1\]"),
        ({"influence_clip_high": 0.2}, "influence_clip_high", "bounds the weight itself"),
        ({"influence_clip_high": math.inf}, "influence_clip_high", "finite"),
        ({"safety_threshold": 0.5}, "safety_threshold", "at least 1"),
        ({"sequence_drop_max_clipped_tokens": -1}, "sequence_drop_max_clipped_tokens", "negative"),
        ({"dual_clip": None}, "sequence_drop", "dual clip, which is off"),
        ({"dual_clip": None, "sequence_drop": False}, "participation_mask", "needs the dual-clip bound"),
    ],
)
def test_fipo_refuses_what_would_not_be_fipo(values, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        FipoConfig(**values)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("section", "values", "field", "message"),
    [
        (FipoConfig, {"constant_influence": 0.0}, "constant_influence", "positive"),
        (FipoConfig, {"self_normalize": True, "aggregation": "sequence_mean"}, "self_normalize", "token_mean"),
        (FipoConfig, {"variance_window_tokens": 1}, "variance_window_tokens", "at least 2"),
        (FipoConfig, {"variance_decay_low": 0.9, "variance_decay_high": 0.5}, "variance_decay_low", "must lie in"),
        (FipoConfig, {"decay": "variance", "decay_half_life_tokens": math.inf}, "decay_half_life_tokens", "median"),
        (DapoConfig, {"aggregation": "sequence_sum"}, "length_divisor", "at least 1"),
        (DrGrpoConfig, {"length_divisor": 0}, "length_divisor", "at least 1"),
        (DrGrpoConfig, {"length_divisor": 9, "aggregation": "token_mean"}, "length_divisor", "does not read it"),
        (CispoConfig, {"weight_low": 1.5}, "weight_low", r"\[0, 1\]"),
        (CispoConfig, {"weight_high": 0.28}, "weight_high", "bounds the ratio itself"),
        (SapoConfig, {"temperature_negative": 0.0}, "temperature_negative", "positive"),
        (GmpoConfig, {"log_clip_high": -0.4}, "log_clip_high", "positive"),
    ],
)
def test_what_an_algorithm_cannot_use_is_refused(section, values, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        section(**values)
    assert error.value.field == field


def test_one_update_is_allowed_without_influence_weights():
    assert DapoConfig(updates_per_rollout=1).updates_per_rollout == 1


def test_infinite_half_life_and_safety_threshold_are_allowed():
    config = FipoConfig(decay_half_life_tokens=math.inf, safety_threshold=math.inf)
    assert math.isinf(config.decay_half_life_tokens) and math.isinf(config.safety_threshold)


@pytest.mark.parametrize("name", FIPO_PRESETS)
def test_card_names_the_preset(name):
    card = effective_algorithm(FipoConfig.preset(name)).splitlines()
    assert card[0] == f"fipo: equals {name}"
    # A heading instead of the type, and a line for each field of the section below.
    assert len(card) == len(dataclasses.fields(FipoConfig)) - 1 + len(dataclasses.fields(RolloutCorrectionConfig))


def test_card_names_the_differences():
    config = FipoConfig.preset("official-7b", decay_half_life_tokens=128.0)
    card = effective_algorithm(config).splitlines()
    assert card[0] == "fipo: official-7b except decay_half_life_tokens"
    assert "  decay_half_life_tokens = 128.0  (official-7b: 32.0)" in card
    assert "  influence_clip_low = 0.8" in card


def test_card_tells_the_section_below_field_by_field():
    card = effective_algorithm(FipoConfig.preset("paper-v2")).splitlines()
    assert "  rollout_correction.kind = none" in card
    assert "  rollout_correction.high = 2.0  (without effect: kind = none)" in card
    correction = RolloutCorrectionConfig(kind="truncate", level="sequence")
    card = effective_algorithm(FipoConfig.preset("paper-v2", rollout_correction=correction)).splitlines()
    assert card[0] == "fipo: paper-v2 except rollout_correction.kind, rollout_correction.level"
    assert "  rollout_correction.kind = truncate  (paper-v2: none)" in card
    assert "  rollout_correction.low = 0.0  (without effect: kind = truncate)" in card


def test_card_of_the_baselines():
    assert effective_algorithm(DapoConfig()).splitlines()[0] == "dapo: equals defaults"
    card = effective_algorithm(GrpoConfig(clip_low=0.1)).splitlines()
    assert card[0] == "grpo: defaults except clip_low"
    assert "  clip_low = 0.1  (defaults: 0.2)" in card


def test_card_says_what_has_no_effect():
    card = effective_algorithm(FipoConfig.preset("official-32b", influence="constant", constant_influence=1.1))
    assert card.splitlines()[0] == "fipo: official-32b except influence, constant_influence"
    assert "  decay_half_life_tokens = 32.0  (without effect: influence = constant)" in card.splitlines()
    card = effective_algorithm(DrGrpoConfig(length_divisor=512)).splitlines()
    assert card[0] == "dr_grpo: equals defaults"
    assert "  advantage_epsilon = 1e-06  (without effect: normalize_advantages_by_std = False)" in card
