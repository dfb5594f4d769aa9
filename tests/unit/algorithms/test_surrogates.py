"""The surrogates' parts: ratios of a response, gates and clips, token by token."""

import math

import pytest
import torch

from megatron_fipo.algorithms.aggregation import SequenceCounts
from megatron_fipo.algorithms.sequence_means import sequence_means
from megatron_fipo.algorithms.surrogates import (
    clipped_log_ratio,
    clipped_surrogate,
    geometric_mean,
    sequence_ratio,
    soft_gate,
    truncated_reinforce,
)
from megatron_fipo.config.baselines import CispoConfig, DapoConfig, GmpoConfig, GrpoConfig, SapoConfig
from megatron_fipo.parallel.layout import PackLayout


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slopes(values: torch.Tensor, of: torch.Tensor) -> list[float]:
    """dy_t/dx_t of every token; y_t reads its own x alone."""
    return torch.autograd.grad(values.sum(), of, retain_graph=True)[0].tolist()


def test_a_mean_is_over_response_tokens_and_zero_where_there_are_none() -> None:
    values = torch.tensor([1.0, 4.0, math.nan, math.nan, math.nan, 8.0])
    counts = SequenceCounts(
        sequence_ids=torch.tensor([0, 0, 0, 1, 2, 2]),
        response_lengths=torch.tensor([2, 0, 1]),
        dropped=torch.zeros(3, dtype=torch.bool),
        counted_here=True,
    )
    means = sequence_means(values, ~values.isnan(), counts, PackLayout((3, 1, 2)), None)
    assert means.tolist() == [2.5, 2.5, 2.5, 0.0, 8.0, 8.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_ratio_is_the_same_bits_on_every_token(dtype: torch.dtype) -> None:
    log_ratio = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    mean = torch.full_like(log_ratio, 3e-4).detach()
    ratio = sequence_ratio(log_ratio, mean)
    assert torch.equal(ratio, mean.exp())
    assert torch.equal(torch.autograd.grad(ratio.sum(), log_ratio)[0], mean.exp())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "cut"),
    [
        (1.5, 1.0, -1.28, 0.0, "high"),
        (0.5, 1.0, -0.5, -1.0, None),
        (0.5, -1.0, 0.8, 0.0, "low"),
        (1.5, -1.0, 1.5, 1.0, None),
        (11.0, -1.0, 10.0, 0.0, None),
        (11.0, 1.0, -1.28, 0.0, "high"),
        (0.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_the_clip_cuts_on_the_side_that_the_advantage_pushes_to(
    ratio: float, advantage: float, loss: float, slope: float, cut: str | None
) -> None:
    ratios = leaf(ratio)
    surrogate = clipped_surrogate(ratios, torch.tensor([advantage], dtype=torch.float64), DapoConfig())
    assert float(surrogate.losses.detach()) == pytest.approx(loss) and slopes(surrogate.losses, ratios) == [slope]
    assert bool(surrogate.clipped_low) == (cut == "low") and bool(surrogate.clipped_high) == (cut == "high")


def test_without_a_dual_clip_the_loss_of_a_negative_advantage_is_unbounded() -> None:
    ratios = leaf(1e6)
    surrogate = clipped_surrogate(ratios, torch.tensor([-1.0], dtype=torch.float64), GrpoConfig())
    assert float(surrogate.losses.detach()) == 1e6 and slopes(surrogate.losses, ratios) == [1.0]


def test_cispo_weighs_the_log_probability_by_the_truncated_ratio() -> None:
    log_probs, ratio = leaf(-1.0, -2.0, -3.0), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    surrogate = truncated_reinforce(log_probs, ratio, advantages, CispoConfig(weight_low=0.5, weight_high=4.0))
    assert surrogate.losses.tolist() == [0.5, -2.0, 24.0]
    assert slopes(surrogate.losses, log_probs) == [-0.5, 1.0, -8.0]
    assert surrogate.clipped_low.tolist() == [True, False, False]
    assert surrogate.clipped_high.tolist() == [False, False, True]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.05, 8.0])
def test_the_soft_gate_is_steepest_on_policy_and_even_around_it(temperature: float) -> None:
    """Its slope by r is sech²(τ(r − 1)/2): 1 at r = 1, the same on both sides, and falling."""
    config = SapoConfig(temperature_positive=temperature, temperature_negative=temperature)
    ratio = leaf(1.0, 0.75, 1.25, 0.5, 1.5, 1e9)
    surrogate = soft_gate(ratio, torch.ones_like(ratio).detach(), config)
    found = slopes(surrogate.losses, ratio)
    wanted = [-1 / math.cosh(min(temperature * (value - 1) / 2, 300.0)) ** 2 for value in ratio.tolist()]
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-100)
    assert found[0] == -1.0 and found[1] == pytest.approx(found[2], rel=1e-12)
    assert surrogate.clipped_low is None and surrogate.clipped_high is None


def test_gmpo_bounds_the_log_ratio_on_the_side_of_the_advantage_alone() -> None:
    config = GmpoConfig(log_clip_low=0.25, log_clip_high=0.5)
    log_ratio = leaf(2.0, -2.0, 0.125, 2.0, -2.0, 0.125)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    bounded = clipped_log_ratio(log_ratio, advantages, config)
    assert bounded.tolist() == [0.5, -2.0, 0.125, 2.0, -0.25, 0.125]
    assert slopes(bounded, log_ratio) == [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    mean = torch.full((6,), 0.75, dtype=torch.float64)
    surrogate = geometric_mean(bounded, mean, log_ratio, advantages)
    loss = math.exp(0.75)
    assert surrogate.losses.tolist() == pytest.approx([-loss] * 3 + [loss] * 3, rel=1e-15)
    assert slopes(surrogate.losses, log_ratio) == pytest.approx([0.0, -loss, -loss, loss, 0.0, loss], rel=1e-15)
    assert surrogate.clipped_high.tolist() == [True] + [False] * 5
    assert surrogate.clipped_low.tolist() == [False] * 4 + [True, False]
