"""The official FIPO rules on NumPy arrays, one response at a time, written from their description.

Nothing of the package is used; only the values of a configuration are read. The Future-KL is its definition, a product
with the matrix of all decays, and derivatives are written out by hand, the influence weights held fixed.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(kw_only=True)
class Response:
    """The tokens of one response that count, [L] each.

    Attributes:
        log_probs: Under the current policy.
        old_log_probs: Under the policy at the start of the rollout's updates.
        advantages: Usually one value for all tokens.
        positions: Places in the sequence, rising; what lies between two of them is masked. None: no gap.
        rollout_log_probs: The engine's, where it is given.
        entropy: Where it is given.
    """

    log_probs: np.ndarray
    old_log_probs: np.ndarray
    advantages: np.ndarray
    positions: np.ndarray | None = None
    rollout_log_probs: np.ndarray | None = None
    entropy: np.ndarray | None = None

    @property
    def places(self) -> np.ndarray:
        return np.arange(len(self.log_probs)) if self.positions is None else self.positions


@dataclass(kw_only=True)
class ResponseTerms:
    """Everything the rules say about a response's tokens, [L] each; `slopes` is dℓ/d log π_θ."""

    log_ratio: np.ndarray
    ratio: np.ndarray
    advantages: np.ndarray
    future_kl: np.ndarray
    weights: np.ndarray
    losses: np.ndarray
    slopes: np.ndarray
    clipped: np.ndarray
    dropped: bool


def response_terms(response: Response, config) -> ResponseTerms:
    """Rules 1 to 7: from log-probabilities to token losses, and whether the response is dropped."""
    advantages = response.advantages
    unclamped = response.log_probs - response.old_log_probs
    log_ratio = np.clip(unclamped, -config.log_ratio_clamp, config.log_ratio_clamp)
    ratio = np.exp(log_ratio)
    total = future_kl(log_ratio * participation(log_ratio, advantages, config), response.places, config)
    weights = influence_weights(total, ratio, advantages, config)

    weighted = advantages * weights
    plain = -weighted * ratio
    bounded = -weighted * np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    losses = np.maximum(plain, bounded)
    slopes = np.where((plain >= bounded) & (np.abs(unclamped) <= config.log_ratio_clamp), plain, 0.0)
    clipped = np.zeros(len(losses), dtype=bool)
    if config.dual_clip is not None:
        ceiling = -weighted * config.dual_clip
        clipped = (weighted < 0) & (losses > ceiling)
        # At the kink itself PyTorch's minimum gives either side half of the gradient.
        slopes = np.where((weighted < 0) & (losses == ceiling), slopes / 2, np.where(clipped, 0.0, slopes))
        losses = np.where(clipped, ceiling, losses)
    return ResponseTerms(
        log_ratio=log_ratio,
        ratio=ratio,
        advantages=advantages,
        future_kl=total,
        weights=weights,
        losses=losses,
        slopes=slopes,
        clipped=clipped,
        dropped=config.sequence_drop and clipped.sum() > config.sequence_drop_max_clipped_tokens,
    )


def participation(log_ratio: np.ndarray, advantages: np.ndarray, config) -> np.ndarray:
    """M: false where a token leaves the Future-KL."""
    everywhere = np.ones(len(log_ratio), dtype=bool)
    if config.participation_mask == "none":
        return everywhere
    stays = log_ratio <= math.log(config.dual_clip)
    return stays | (advantages >= 0) if config.participation_mask == "negative_advantage" else stays


def future_kl(terms: np.ndarray, places: np.ndarray, config) -> np.ndarray:
    """F_t = Σ_{k ≥ t} γ^(k−t) κ_k, distances counted in positions of the sequence."""
    distance = places[None, :] - places[:, None]
    decay = 2.0 ** (-np.maximum(distance, 0) / config.decay_half_life_tokens)
    return np.where(distance >= 0, decay, 0.0) @ terms


def influence_weights(total: np.ndarray, ratio: np.ndarray, advantages: np.ndarray, config) -> np.ndarray:
    """f: the clipped exponential, made safe."""
    weights = np.clip(np.exp(np.minimum(total, 700.0)), config.influence_clip_low, config.influence_clip_high)
    safe = np.clip(weights, 0.8, 1.0) if config.safety_mode == "clamp" else np.ones(len(weights))
    return np.where((advantages < 0) & (ratio > config.safety_threshold), safe, weights)


@dataclass(kw_only=True)
class MiniBatch:
    """One update's loss (0 where no token is left), gradient per response, terms per response, and metrics."""

    loss: float
    gradients: list[np.ndarray]
    terms: list[ResponseTerms]
    metrics: dict[str, float]


def mini_batch(micro_batches: list[list[Response]], config) -> MiniBatch:
    """Rules 8 and 9: the average over the mini-batch, whose responses are given micro-batch by micro-batch."""
    groups = [[response_terms(response, config) for response in responses] for responses in micro_batches]
    everything = [terms for group in groups for terms in group]
    kept = [terms for terms in everything if not terms.dropped]
    kept_tokens = sum(len(terms.losses) for terms in kept)
    loss, gradients = 0.0, []
    for group in groups:
        group_tokens = sum(len(terms.losses) for terms in group if not terms.dropped)
        for terms in group:
            if terms.dropped:
                gradients.append(np.zeros(len(terms.losses)))
                continue
            if config.aggregation == "token_mean":
                factor = 1 / kept_tokens
            elif config.aggregation == "sequence_mean":
                factor = 1 / (len(terms.losses) * len(kept))
            else:
                factor = len(group) / len(everything) / (group_tokens + 1e-8)
            loss += factor * terms.losses.sum()
            gradients.append(factor * terms.slopes)
    responses = [response for group in micro_batches for response in group]
    return MiniBatch(
        loss=float(loss), gradients=gradients, terms=everything, metrics=_metrics(responses, everything, config)
    )


def _metrics(responses: list[Response], terms: list[ResponseTerms], config) -> dict[str, float]:
    """What docs/metrics.md says of an update's tokens; what is taken over nothing is left out."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in terms]) if terms else np.zeros(0)

    advantages, ratio, log_ratio = joined("advantages"), joined("ratio"), joined("log_ratio")
    kept = np.concatenate([np.full(len(one.losses), not one.dropped) for one in terms]) if terms else np.zeros(0, bool)
    metrics = {
        "train/loss": _mean(joined("losses")[kept]),
        "train/policy_kl": _mean(-log_ratio),
        "train/policy_kl_k3": _mean(ratio - 1 - log_ratio),
        "train/clip_fraction_low": _mean((advantages < 0) & (ratio < 1 - config.clip_low)),
        "train/clip_fraction_high": _mean((advantages > 0) & (ratio > 1 + config.clip_high)),
        "train/length_weighted_advantage": _mean(advantages),
        "fipo/dual_clip_fraction": math.nan if config.dual_clip is None else _mean(joined("clipped")),
        "fipo/dropped_sequences": float(sum(one.dropped for one in terms)),
    }
    metrics |= _ratio_metrics(ratio, ratio[advantages < 0], ratio[advantages > 0], config)
    metrics |= _influence_metrics(joined("future_kl"), joined("weights"), config)
    step = np.abs(advantages[kept])
    metrics["fipo/step_size_ratio"] = (step * joined("weights")[kept]).sum() / step.sum() if step.any() else math.nan
    if responses and responses[0].rollout_log_probs is not None:
        mismatch = np.concatenate([one.rollout_log_probs - one.old_log_probs for one in responses])
        metrics["train/mismatch_mean_abs"] = _mean(np.abs(mismatch))
        metrics["train/mismatch_max"] = np.abs(mismatch).max(initial=-math.inf)
        metrics["train/mismatch_kl"] = _mean(mismatch)
        kept_within = np.clip(mismatch, -20.0, 20.0)
        metrics["train/mismatch_kl_k3"] = _mean(np.exp(-kept_within) - 1 + kept_within)
    if responses and responses[0].entropy is not None:
        metrics["train/entropy"] = _mean(np.concatenate([one.entropy for one in responses]))
    return {key: float(value) for key, value in metrics.items() if math.isfinite(value)}


def _ratio_metrics(ratio: np.ndarray, negative: np.ndarray, positive: np.ndarray, config) -> dict[str, float]:
    last = math.inf if config.dual_clip is None else config.dual_clip
    return {
        "train/log_ratio_abs_max": np.abs(np.log(ratio)).max(initial=-math.inf),
        "train/ratio_mean": _mean(ratio),
        "train/ratio_max": ratio.max(initial=-math.inf),
        **_quantiles("train/ratio_negative", negative, {"p75": 0.75, "p995": 0.995, "p999": 0.999}),
        "train/ratio_negative_max": negative.max(initial=-math.inf),
        "train/ratio_negative_count_2_3": float(((negative >= 2) & (negative < 3)).sum()),
        "train/ratio_negative_count_3_4": float(((negative >= 3) & (negative < 4)).sum()),
        "train/ratio_negative_count_4_c": float(((negative >= 4) & (negative <= last)).sum()),
        "train/ratio_positive_min": positive.min(initial=math.inf),
        **_quantiles(
            "train/ratio_positive", positive, {"p25": 0.25, "p50": 0.5, "p75": 0.75, "p995": 0.995, "p999": 0.999}
        ),
        "train/ratio_positive_max": positive.max(initial=-math.inf),
        "train/ratio_positive_fraction_below_1e3": _mean(positive < 1e-3),
    }


def _influence_metrics(total: np.ndarray, weights: np.ndarray, config) -> dict[str, float]:
    raw = np.exp(np.clip(total, -20.0, 20.0))
    changed = weights != 1
    metrics = {
        "fipo/future_kl_mean": _mean(total),
        "fipo/future_kl_square_mean": _mean(total**2),
        "fipo/fraction_changed": _mean(changed),
        "fipo/fraction_at_lower_bound": _mean(changed & (weights <= config.influence_clip_low)),
        "fipo/fraction_at_upper_bound": _mean(changed & (weights >= config.influence_clip_high)),
    }
    levels = {"p01": 0.01, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p99": 0.99, "p999": 0.999}
    for name, values in (("fipo/influence_weight", weights), ("fipo/influence_raw", raw)):
        metrics[f"{name}_mean"] = _mean(values)
        metrics[f"{name}_min"] = values.min(initial=math.inf)
        metrics[f"{name}_max"] = values.max(initial=-math.inf)
        metrics |= _quantiles(name, values, levels)
    return metrics


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _quantiles(name: str, values: np.ndarray, levels: dict[str, float]) -> dict[str, float]:
    """Nearest rank: the ⌈q·n⌉-th smallest. (A product such as 0.7·10 must not round up past a whole number.)"""
    ordered = np.sort(values)
    places = {suffix: math.ceil(round(level * 1000) * len(values) / 1000) - 1 for suffix, level in levels.items()}
    return {f"{name}_{suffix}": float(ordered[place]) for suffix, place in places.items() if len(values)}
