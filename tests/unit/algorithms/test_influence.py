import math

import pytest
import torch

from megatron_fipo.algorithms.influence import influence_weights, participating_log_ratio
from megatron_fipo.config.algorithm import FipoConfig

ONE = torch.ones(1)


def weight(future_kl: float, config: FipoConfig, ratio: float = 1.0, advantage: float = 1.0) -> float:
    weights = influence_weights(
        torch.tensor([future_kl], dtype=torch.float64),
        torch.tensor([ratio], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        config,
    )
    return float(weights)


@pytest.mark.parametrize(
    ("low", "high", "future_kl", "expected"),
    [
        (1.0, 1.2, 0.0, 1.0),
        (1.0, 1.2, math.log(1.1), 1.1),
        (1.0, 1.2, 5.0, 1.2),
        (1.0, 1.2, -5.0, 1.0),
        (0.8, 1.2, math.log(0.9), 0.9),
        (0.8, 1.2, -5.0, 0.8),
        (0.0, 10.0, -5.0, math.exp(-5.0)),
        (0.0, 10.0, math.log(9.0), 9.0),
        (0.0, 10.0, 50.0, 10.0),
        (1.0, 1.2, 1e4, 1.2),
        (0.8, 1.2, -1e4, 0.8),
    ],
)
def test_weight_is_the_clipped_exponential(low, high, future_kl, expected):
    config = FipoConfig(influence_clip_low=low, influence_clip_high=high)
    assert weight(future_kl, config) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("mode", "low", "future_kl", "ratio", "advantage", "expected"),
    [
        ("clamp", 0.8, 5.0, 3.5, -1.0, 1.0),
        ("clamp", 0.8, math.log(0.9), 3.5, -1.0, 0.9),
        ("clamp", 0.0, -5.0, 3.5, -1.0, 0.8),
        ("reset", 0.8, 5.0, 3.5, -1.0, 1.0),
        ("reset", 0.8, math.log(0.9), 3.5, -1.0, 1.0),
        ("clamp", 0.8, 5.0, 3.0, -1.0, 1.2),
        ("clamp", 0.8, 5.0, 3.5, 1.0, 1.2),
        ("reset", 0.8, 5.0, 3.5, 0.0, 1.2),
    ],
)
def test_safety_acts_on_negative_advantages_above_the_threshold(mode, low, future_kl, ratio, advantage, expected):
    config = FipoConfig(safety_mode=mode, safety_threshold=3.0, influence_clip_low=low)
    assert weight(future_kl, config, ratio, advantage) == pytest.approx(expected, rel=1e-14)


def test_safety_can_be_turned_off():
    assert weight(5.0, FipoConfig(safety_threshold=math.inf), ratio=1e8, advantage=-1.0) == 1.2


def test_weights_carry_no_gradient():
    future_kl = torch.tensor([0.1], requires_grad=True)
    ratio = torch.tensor([2.0], requires_grad=True)
    assert not influence_weights(future_kl, ratio, -ONE, FipoConfig()).requires_grad


def test_weights_overflow_to_the_bound_in_float32():
    weights = influence_weights(torch.tensor([900.0, -900.0]), ONE, ONE, FipoConfig.preset("official-7b"))
    assert torch.equal(weights, torch.tensor([1.2, 0.8]))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("all_tokens", [0.0, 0.0, 2.0, -9.0]),
        ("negative_advantage", [3.0, 0.0, 2.0, -9.0]),
        ("none", [3.0, 3.0, 2.0, -9.0]),
    ],
)
def test_participation_is_one_sided(mask, expected):
    log_ratio = torch.tensor([3.0, 3.0, 2.0, -9.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    terms = participating_log_ratio(log_ratio, advantages, FipoConfig(participation_mask=mask))
    assert terms.tolist() == expected
    assert not terms.requires_grad


def test_without_a_dual_clip_all_tokens_stay():
    config = FipoConfig(dual_clip=None, sequence_drop=False, participation_mask="none")
    terms = participating_log_ratio(torch.tensor([19.0]), -ONE, config)
    assert terms.tolist() == [19.0]
