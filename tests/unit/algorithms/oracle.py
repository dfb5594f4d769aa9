"""The official FIPO rules written token by token in plain Python floats, gradient included.

It shares no code with the package; only the configuration's values are read from it.
"""

import math
from dataclasses import dataclass


@dataclass(kw_only=True)
class Response:
    """One sequence's response tokens, without padding."""

    log_probs: list[float]
    old_log_probs: list[float]
    advantage: float


@dataclass(kw_only=True)
class ResponseTerms:
    future_kl: list[float]
    weights: list[float]
    losses: list[float]
    gradients: list[float]
    num_clipped: int

    def dropped(self, config) -> bool:
        return config.sequence_drop and self.num_clipped > config.sequence_drop_max_clipped_tokens


def response_terms(response: Response, config) -> ResponseTerms:
    advantage = response.advantage
    raw_log_ratios = [new - old for new, old in zip(response.log_probs, response.old_log_probs, strict=True)]
    log_ratios = [min(max(value, -20.0), 20.0) for value in raw_log_ratios]
    future_kl = _future_kl(log_ratios, advantage, config)
    weights, losses, gradients = [], [], []
    num_clipped = 0
    for raw, log_ratio, total in zip(raw_log_ratios, log_ratios, future_kl, strict=True):
        ratio = math.exp(log_ratio)
        weight = _weight(total, ratio, advantage, config)
        weighted = advantage * weight
        bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        loss = max(-weighted * ratio, -weighted * bounded)
        gradient = -weighted * ratio if -weighted * ratio >= -weighted * bounded and abs(raw) <= 20.0 else 0.0
        if advantage < 0 and config.dual_clip is not None and loss > -weighted * config.dual_clip:
            loss, gradient = -weighted * config.dual_clip, 0.0
            num_clipped += 1
        weights.append(weight)
        losses.append(loss)
        gradients.append(gradient)
    return ResponseTerms(
        future_kl=future_kl, weights=weights, losses=losses, gradients=gradients, num_clipped=num_clipped
    )


def _future_kl(log_ratios: list[float], advantage: float, config) -> list[float]:
    participates = []
    for log_ratio in log_ratios:
        beyond = config.dual_clip is not None and log_ratio > math.log(config.dual_clip)
        if config.participation_mask == "negative_advantage":
            beyond = beyond and advantage < 0
        participates.append(not beyond or config.participation_mask == "none")
    result = []
    for t in range(len(log_ratios)):
        total = 0.0
        for k in range(t, len(log_ratios)):
            if participates[k]:
                total += 2.0 ** (-(k - t) / config.decay_half_life_tokens) * log_ratios[k]
        result.append(total)
    return result


def _weight(future_kl: float, ratio: float, advantage: float, config) -> float:
    weight = math.exp(min(future_kl, 700.0))
    weight = min(max(weight, config.influence_clip_low), config.influence_clip_high)
    if advantage < 0 and ratio > config.safety_threshold:
        weight = 1.0 if config.safety_mode == "reset" else min(max(weight, 0.8), 1.0)
    return weight


@dataclass(kw_only=True)
class MiniBatchLoss:
    loss: float
    gradients: list[list[float]]
    num_dropped: int


def mini_batch_loss(micro_batches: list[list[Response]], config) -> MiniBatchLoss:
    """Loss and gradient of one mini-batch, its responses given micro-batch by micro-batch."""
    num_samples = sum(len(responses) for responses in micro_batches)
    terms = [[response_terms(response, config) for response in responses] for responses in micro_batches]
    kept = [term for group in terms for term in group if not term.dropped(config)]
    kept_tokens = sum(len(term.losses) for term in kept)
    loss = 0.0
    gradients = []
    for group in terms:
        group_tokens = sum(len(term.losses) for term in group if not term.dropped(config))
        for term in group:
            length = len(term.losses)
            if term.dropped(config):
                gradients.append([0.0] * length)
                continue
            factor = {
                "token_mean": 1 / kept_tokens,
                "sequence_mean": 1 / (length * len(kept)),
                "official_micro_batch": len(group) / (group_tokens * num_samples),
            }[config.aggregation]
            loss += factor * sum(term.losses)
            gradients.append([factor * gradient for gradient in term.gradients])
    num_dropped = sum(term.dropped(config) for group in terms for term in group)
    return MiniBatchLoss(loss=loss, gradients=gradients, num_dropped=num_dropped)
