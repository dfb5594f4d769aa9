"""The effective-algorithm card: which algorithm a configuration is, told field by field."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from megatron_fipo.config.algorithm import FIPO_PRESETS, AlgorithmConfig, FipoConfig

CARD_FILE = "effective_algorithm.txt"
"""The card's name in a run directory and in an export."""


def effective_algorithm(config: AlgorithmConfig) -> str:
    """Say which algorithm a configuration is: every value, and the published setting nearest to it.

    Args:
        config: The algorithm section.

    Returns:
        Lines of text: a heading, then one line a field. Fields that differ from the nearest preset (FIPO) or from
        the algorithm's defaults show the other value too; fields that nothing reads under the other values say why.
    """
    values = _flat(dict(_items(config)))
    presets = FIPO_PRESETS if isinstance(config, FipoConfig) else {"defaults": _defaults(config)}
    settings = {name: _flat(setting) for name, setting in presets.items()}
    unread = _unread(config)
    differences = {
        name: [key for key, value in setting.items() if values[key] != value and key not in unread]
        for name, setting in settings.items()
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    changed = differences[nearest]
    lines = [f"{config.type}: {nearest} except {', '.join(changed)}" if changed else f"{config.type}: equals {nearest}"]
    for key, value in values.items():
        if key != "type":
            notes = [f"{nearest}: {settings[nearest][key]}"] if key in changed else []
            notes += [f"without effect: {unread[key]}"] if key in unread else []
            lines.append(f"  {key} = {value}" + "".join(f"  ({note})" for note in notes))
    return "\n".join(lines)


def _items(section: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(section, field.name)) for field in dataclasses.fields(section)]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name, those of sections below included."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            flat |= {f"{name}.{key}": below for key, below in _items(value)}
        else:
            flat[name] = value
    return flat


def _defaults(config: AlgorithmConfig) -> dict[str, Any]:
    return {
        field.name: field.default for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING
    }


def _unread(config: AlgorithmConfig) -> dict[str, str]:
    """Fields that have no effect, with the reason."""
    unread = {}
    if not config.normalize_advantages_by_std:
        unread["advantage_epsilon"] = "normalize_advantages_by_std = False"
    if config.reference_kl_coefficient == 0:
        unread["reference_kl_estimator"] = "reference_kl_coefficient = 0"
    correction = config.rollout_correction.kind
    if correction == "none":
        unread |= dict.fromkeys([f"rollout_correction.{key}" for key in ("level", "low", "high")], "kind = none")
    if correction == "truncate":
        unread["rollout_correction.low"] = "kind = truncate"
    if isinstance(config, FipoConfig):
        unread |= _unread_by_fipo(config)
    return unread


def _unread_by_fipo(config: FipoConfig) -> dict[str, str]:
    unread = {}
    if not config.sequence_drop:
        unread["sequence_drop_max_clipped_tokens"] = "sequence_drop = False"
    if config.safety_threshold == math.inf:
        unread["safety_mode"] = "safety_threshold = inf"
    variance = ("variance_window_tokens", "variance_decay_low", "variance_decay_high")
    if config.decay != "variance":
        unread |= dict.fromkeys(variance, f"decay = {config.decay}")
    if config.influence != "constant":
        unread["constant_influence"] = f"influence = {config.influence}"
        return unread
    of_the_weights = (
        "decay_half_life_tokens",
        "influence_clip_low",
        "influence_clip_high",
        "participation_mask",
        "safety_threshold",
        "safety_mode",
        "include_current_token",
        "decay",
        *variance,
    )
    return unread | dict.fromkeys(of_the_weights, "influence = constant")
