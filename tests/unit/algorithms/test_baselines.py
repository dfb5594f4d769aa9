"""Every baseline against its published loss and gradient, at its limits, and on batches with nothing in them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithms.losses import policy_loss_on_rows
from megatron_fipo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_fipo.config.algorithm import FipoConfig
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
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.parallel.layout import PackLayout
from tests.unit.algorithms.baseline_formulas import (
    ALGORITHMS,
    BASELINES,
    Rows,
    loss_and_gradient,
    published_loss,
    rows,
)

SPREADS = [0.0, 3e-4, 0.05, 0.5, 2.0]
TIS = RolloutCorrectionConfig(kind="truncate", high=2.0)
WIDE = {"clip_low": 0.999999, "clip_high": 1e9, "dual_clip": None}


def on_tokens(gradient: torch.Tensor, batch: Rows) -> list[float]:
    """The gradient on response tokens; elsewhere it must be zero."""
    assert not gradient[~batch["response_mask"]].any()
    return gradient[batch["response_mask"]].tolist()


@pytest.mark.parametrize("name", BASELINES)
@given(seed=st.integers(0, 2**16), spread=st.sampled_from(SPREADS), count=st.integers(1, 6))
@settings(max_examples=40)
def test_value_and_gradient_are_the_published_ones(name: str, seed: int, spread: float, count: int) -> None:
    batch = rows(seed, spread, count)
    result, gradient = loss_and_gradient(batch, BASELINES[name])
    loss, wanted = published_loss(batch, BASELINES[name])
    assert float(result.loss.detach()) == pytest.approx(loss, rel=1e-12, abs=1e-13)
    assert on_tokens(gradient, batch) == pytest.approx(wanted[batch["response_mask"]], rel=1e-11, abs=1e-13)


def finite_differences(batch: Rows, name: str, step: float = 1e-6) -> list[float]:
    """Slopes of the loss itself by central differences, token by token."""
    slopes = []
    for place in batch["response_mask"].nonzero():
        values = []
        for sign in (1, -1):
            moved = batch["log_probs"].detach().clone()
            moved[tuple(place)] += sign * step
            values.append(float(policy_loss_on_rows(**{**batch, "log_probs": moved}, config=ALGORITHMS[name]).loss))
        slopes.append((values[0] - values[1]) / (2 * step))
    return slopes


@pytest.mark.parametrize("name", [name for name in BASELINES if "cispo" not in name])
@pytest.mark.parametrize("spread", [1e-4, 0.3])
def test_gradient_is_the_slope_of_the_loss(name: str, spread: float) -> None:
    """Moving one token moves its whole response's ratio in GSPO and GMPO: their token form has that slope too.

    Not CISPO, whose weight carries no gradient. No ratio of these batches lies within a step of a bound.
    """
    batch = rows(seed=4, spread=spread)
    _, gradient = loss_and_gradient(batch, BASELINES[name])
    assert on_tokens(gradient, batch) == pytest.approx(finite_differences(batch, name), rel=1e-6, abs=1e-9)
    assert any(on_tokens(gradient, batch))


@pytest.mark.parametrize("config", [GspoConfig(**WIDE), GmpoConfig(log_clip_low=30.0, log_clip_high=30.0)])
@given(seed=st.integers(0, 999), spread=st.sampled_from([0.01, 0.5]))
@settings(max_examples=20)
def test_token_form_has_the_gradient_of_the_sequence_form(
    config: GspoConfig | GmpoConfig, seed: int, spread: float
) -> None:
    """Autograd through the mean over the response itself, which the token form takes without gradient."""
    batch = rows(seed, spread)
    mask = batch["response_mask"]
    log_ratio = torch.where(mask, batch["log_probs"] - batch["old_log_probs"], 0.0)
    ratios = (log_ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).exp()
    advantages = torch.where(mask, batch["advantages"], 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    loss = -(ratios * advantages).sum() / mask.any(dim=1).sum()
    (wanted,) = torch.autograd.grad(loss, batch["log_probs"])
    result, gradient = loss_and_gradient(batch, config)
    torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_every_gradient_is_that_of_reinforce(name: str) -> None:
    config = ALGORITHMS[name]
    batch = rows(seed=1, spread=0.0)
    _, gradient = loss_and_gradient(batch, config)
    mask = batch["response_mask"]
    lengths = mask.sum(dim=1, keepdim=True).double()
    num_responses = int((lengths > 0).sum())
    weights = {
        "token_mean": 1 / lengths.sum(),
        "sequence_mean": 1 / (lengths * num_responses),
        "sequence_sum": 1 / ((config.length_divisor or 1) * num_responses),
    }
    wanted = torch.where(mask, -batch["advantages"] * weights[config.aggregation], 0.0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=0)


@given(seed=st.integers(0, 999), spread=st.sampled_from([0.05, 0.5]))
@settings(max_examples=20)
def test_gspo_on_one_token_responses_is_the_clip_of_a_token(seed: int, spread: float) -> None:
    batch = rows(seed, spread, count=9, length=1)
    ours, gradient = loss_and_gradient(batch, GspoConfig(clip_low=0.2, clip_high=0.28))
    ppo, wanted = loss_and_gradient(batch, GrpoConfig(clip_low=0.2, clip_high=0.28))
    assert torch.equal(ours.loss, ppo.loss) and torch.equal(gradient, wanted)
    assert ours.metrics == ppo.metrics


def test_gmpo_with_wide_clips_is_gspo_without_a_clip() -> None:
    batch = rows(seed=2, spread=0.7)
    ours, gradient = loss_and_gradient(batch, GmpoConfig(log_clip_low=30.0, log_clip_high=30.0))
    gspo, wanted = loss_and_gradient(batch, GspoConfig(**WIDE))
    torch.testing.assert_close(ours.loss, gspo.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-14, atol=0)


def test_sapo_tends_to_the_plain_surrogate_with_its_temperature() -> None:
    """4/τ·σ(τ(r−1)) is 2/τ + (r−1) − τ²(r−1)³/12 + …: the error falls a hundredfold with a tenth of τ."""
    batch = rows(seed=3, spread=0.5)
    mask = batch["response_mask"]
    ratio = torch.where(mask, batch["log_probs"] - batch["old_log_probs"], 0.0).exp()
    advantages = torch.where(mask, batch["advantages"], 0.0)
    plain = -(ratio * advantages)[mask].mean()
    (wanted,) = torch.autograd.grad(plain, batch["log_probs"])
    errors = []
    for temperature in (1e-1, 1e-2, 1e-3):
        config = SapoConfig(
            temperature_positive=temperature, temperature_negative=temperature, aggregation="token_mean"
        )
        result, gradient = loss_and_gradient(batch, config)
        constant = -(advantages[mask] * (2 / temperature - 1)).mean()
        torch.testing.assert_close(result.loss - constant, plain, rtol=0, atol=temperature**2)
        errors.append(float((gradient - wanted).abs().max()))
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.05)
    assert errors[2] == pytest.approx(errors[1] / 100, rel=0.05)


def test_sapo_takes_the_temperature_of_the_sign() -> None:
    batch = rows(seed=3, spread=0.5)
    steep = SapoConfig(temperature_positive=1.0, temperature_negative=9.0)
    _, gradient = loss_and_gradient(batch, steep)
    _, even = loss_and_gradient(batch, SapoConfig(temperature_positive=1.0, temperature_negative=1.0))
    positive = batch["advantages"] > 0
    assert torch.equal(gradient[positive], even[positive])
    assert not torch.equal(gradient, even)


def test_cispo_keeps_the_gradient_of_truncated_tokens() -> None:
    """A PPO clip takes such tokens out; the truncated weight is all that is left of their ratio here."""
    shift = torch.tensor([[math.log(8.0), math.log(0.25), -30.0, 0.0]], dtype=torch.float64)
    for advantage in (2.0, -2.0):
        batch = {
            "log_probs": (shift - 1.0).requires_grad_(),
            "old_log_probs": torch.full_like(shift, -1.0),
            "advantages": torch.full_like(shift, advantage),
            "response_mask": torch.ones_like(shift, dtype=torch.bool),
        }
        _, gradient = loss_and_gradient(batch, CispoConfig(weight_low=0.5, weight_high=4.0))
        assert gradient[0].tolist() == pytest.approx([-advantage * weight / 4 for weight in (4.0, 0.5, 0.5, 1.0)])


def test_cispo_without_bounds_has_the_gradient_of_the_plain_surrogate() -> None:
    """∇(r·A) = r·A·∇log π, the importance-weighted REINFORCE."""
    batch = rows(seed=5, spread=0.5)
    _, gradient = loss_and_gradient(batch, CispoConfig(weight_low=0.0, weight_high=1e9))
    mask = batch["response_mask"]
    ratio = (batch["log_probs"] - batch["old_log_probs"])[mask].exp()
    plain = -(ratio * batch["advantages"][mask]).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, batch["log_probs"])[0], rtol=1e-12, atol=0)


def test_dr_grpo_weighs_every_token_alike_whatever_the_other_lengths() -> None:
    """What a response contributes depends on no other response, and grows with its own length."""
    batch = rows(seed=14, spread=0.3, count=4, length=20)
    config = DrGrpoConfig(length_divisor=20)
    _, gradient = loss_and_gradient(batch, config)
    shortened = {name: value.detach().clone() for name, value in batch.items()}
    for row in (1, 2):
        shortened["response_mask"][row, int(batch["response_mask"][row].nonzero()[0]) + 1 :] = False
    shortened["log_probs"].requires_grad_()
    _, changed = loss_and_gradient(shortened, config)
    assert shortened["response_mask"].sum() < batch["response_mask"].sum()
    assert torch.equal(gradient[[0, 3]], changed[[0, 3]])
    _, grpo = loss_and_gradient(batch, GrpoConfig())
    lengths = batch["response_mask"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(gradient * 20, grpo * lengths, rtol=1e-12, atol=0)


def test_dr_grpo_is_token_mean_times_the_mean_length_over_the_divisor() -> None:
    batch = rows(seed=7, spread=0.3)
    ours, _ = loss_and_gradient(batch, DrGrpoConfig(length_divisor=9))
    mean, _ = loss_and_gradient(batch, DapoConfig(clip_high=0.2, dual_clip=None))
    mask = batch["response_mask"]
    torch.testing.assert_close(ours.loss, mean.loss * mask.sum() / mask.any(dim=1).sum() / 9, rtol=1e-12, atol=0)


def test_a_huge_dual_clip_is_none() -> None:
    batch = rows(seed=8, spread=2.0)
    for section in (GrpoConfig, DapoConfig, GspoConfig):
        none, gradient = loss_and_gradient(batch, section(dual_clip=None))
        huge, same = loss_and_gradient(batch, section(dual_clip=1e8))
        tight, other = loss_and_gradient(batch, section(dual_clip=1.01))
        assert torch.equal(none.loss, huge.loss) and torch.equal(gradient, same)
        assert not torch.equal(gradient, other) and tight.loss < none.loss


def test_one_ratio_a_response_is_one_number_on_all_its_tokens_in_float32() -> None:
    """Clipped is a response, not some of its tokens, although the mean ratio lies within rounding of the bound."""
    length = 4096
    shift = torch.randn(2, length, generator=torch.Generator().manual_seed(0))
    shift += math.log(1 + 4e-4) - shift.mean(dim=1, keepdim=True)
    batch = {
        "log_probs": (shift - 3.0).requires_grad_(),
        "old_log_probs": torch.full((2, length), -3.0),
        "advantages": torch.ones(2, length),
        "response_mask": torch.ones(2, length, dtype=torch.bool),
    }
    result, gradient = loss_and_gradient(batch, GspoConfig())
    assert result.metrics["train/clip_fraction_high"] in (0.0, 0.5, 1.0)
    assert all(len(row.unique()) == 1 for row in gradient)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (1, 1), (3, 4)])
def test_nothing_to_learn_from_is_zero(name: str, shape: tuple[int, int]) -> None:
    batch = {
        "log_probs": torch.full(shape, math.nan, requires_grad=True),
        "old_log_probs": torch.full(shape, math.nan),
        "advantages": torch.full(shape, math.nan),
        "response_mask": torch.zeros(shape, dtype=torch.bool),
    }
    result, gradient = loss_and_gradient(batch, ALGORITHMS[name])
    assert float(result.loss.detach()) == 0.0
    assert gradient.shape == shape and not gradient.any()
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_token_is_enough(name: str) -> None:
    batch = {
        "log_probs": torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True),
        "old_log_probs": torch.tensor([[-1.0]], dtype=torch.float64),
        "advantages": torch.tensor([[0.5]], dtype=torch.float64),
        "response_mask": torch.tensor([[True]]),
    }
    result, gradient = loss_and_gradient(batch, ALGORITHMS[name])
    divisor = ALGORITHMS[name].length_divisor or 1
    values = {"sapo": -1.0, "sapo, steep": -0.5 * 2 / 3, "cispo": 0.5, "cispo, tight": 0.5}
    assert float(result.loss.detach()) == pytest.approx(values.get(name, -0.5) / divisor)
    assert float(gradient) == pytest.approx(-0.5 / divisor)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("garbage", [0.0, math.inf, -math.inf, 1e30])
def test_what_lies_outside_the_mask_is_never_read(name: str, garbage: float) -> None:
    config = dataclasses.replace(ALGORITHMS[name], rollout_correction=TIS, reference_kl_coefficient=0.1)
    batch = rows(seed=9, spread=0.5)
    more = {"rollout_log_probs": batch["old_log_probs"] + 0.1, "reference_log_probs": batch["old_log_probs"] - 0.2}
    clean, gradient = loss_and_gradient(batch, config, **more)
    outside = ~batch["response_mask"]
    filled = {name: value.detach().masked_fill(outside, garbage) for name, value in batch.items()}
    filled |= {"response_mask": batch["response_mask"], "log_probs": filled["log_probs"].requires_grad_()}
    more = {name: value.masked_fill(outside, garbage) for name, value in more.items()}
    dirty, same = loss_and_gradient(filled, config, **more)
    assert clean.loss.isfinite() and torch.equal(clean.loss, dirty.loss)
    assert torch.equal(gradient, same)
    assert clean.metrics == dirty.metrics


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("where", ["log_probs", "old_log_probs", "advantages"])
def test_a_nan_on_a_response_token_surfaces(name: str, where: str) -> None:
    batch = rows(seed=9, spread=0.5)
    values = batch[where].detach().clone()
    values[tuple(batch["response_mask"].nonzero()[3])] = math.nan
    result = policy_loss_on_rows(**{**batch, where: values}, config=ALGORITHMS[name])
    assert result.loss.isnan()


@pytest.mark.parametrize("config", [GspoConfig(), GmpoConfig()])
def test_a_response_on_two_ranks_needs_their_group(config: GspoConfig | GmpoConfig) -> None:
    inputs = LossInputs(
        log_probs=torch.zeros(2),
        old_log_probs=torch.zeros(2),
        advantages=torch.ones(2),
        response_mask=torch.ones(2, dtype=torch.bool),
        response_lengths=torch.tensor([4]),
        layout=PackLayout((4,), cp_size=2),
    )
    with pytest.raises(ValueError, match="group = None: the layout has cp_size = 2"):
        policy_loss(inputs, config)


# What each algorithm cuts off below and above; None where it has no bound to report.
CUT = {
    "grpo": (0.8, 1.2),
    "dapo": (0.8, 1.28),
    "dr_grpo": (0.8, 1.2),
    "gspo": (1 - 3e-4, 1 + 4e-4),
    "gspo, wide clip": (0.8, 1.28),
    "cispo": (None, 5.0),
    "cispo, tight": (0.7, 1.3),
    "sapo": None,
    "sapo, steep": None,
    "gmpo": (math.exp(-0.4), math.exp(0.4)),
    "gmpo, lopsided": (math.exp(-0.1), math.exp(0.6)),
    "fipo": (0.8, 1.28),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_clip_fractions_count_what_the_algorithm_cuts_off(name: str) -> None:
    """Tokens on the side of the ratio from which the advantage pushes; with CISPO on either; responses with GSPO."""
    batch = rows(seed=10, spread=1.0, count=8, length=30)
    mask = batch["response_mask"].numpy()
    difference = (batch["log_probs"] - batch["old_log_probs"]).detach().numpy()
    ratios, signs, all_ratios = [], [], []
    for row, chosen in enumerate(mask):
        tokens = np.exp(difference[row][chosen])
        all_ratios.extend(tokens)
        ratios.extend(np.full(len(tokens), np.exp(np.log(tokens).mean())) if name.startswith("gspo") else tokens)
        signs.extend(np.sign(batch["advantages"].numpy()[row][chosen]))
    ratio, sign = np.array(ratios), np.array(signs)
    metrics = policy_loss_on_rows(**batch, config=ALGORITHMS[name]).metrics
    fractions = [metrics.get(f"train/clip_fraction_{side}") for side in ("low", "high")]
    assert metrics["train/ratio_mean"] == pytest.approx(np.mean(all_ratios), rel=1e-12)
    if CUT[name] is None:
        assert fractions == [None, None]
        return
    low, high = CUT[name]
    on_the_side = [np.ones(len(sign), dtype=bool)] * 2 if "cispo" in name else [sign < 0, sign > 0]
    assert fractions[0] == (None if low is None else pytest.approx(np.mean(on_the_side[0] & (ratio < low)), rel=1e-12))
    assert fractions[1] == pytest.approx(np.mean(on_the_side[1] & (ratio > high)), rel=1e-12)
    assert fractions[1] > 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_metric_is_in_the_catalogue(name: str) -> None:
    config = dataclasses.replace(ALGORITHMS[name], rollout_correction=TIS, reference_kl_coefficient=0.1)
    batch = rows(seed=11, spread=0.5)
    more = {"rollout_log_probs": batch["old_log_probs"], "reference_log_probs": batch["old_log_probs"]}
    for key in policy_loss_on_rows(**batch, config=config, **more).metrics:
        CATALOGUE.find(key)
    assert isinstance(config, FipoConfig) or not any(
        key.startswith("fipo/influence") for key in policy_loss_on_rows(**batch, config=config, **more).metrics
    )


@pytest.mark.parametrize("name", ["gspo, wide clip", "dapo", "fipo"])
def test_dual_clip_fraction_counts_tokens_beyond_it(name: str) -> None:
    config = dataclasses.replace(ALGORITHMS[name], dual_clip=1.5)
    batch = rows(seed=12, spread=1.0, count=8, length=30)
    mask = batch["response_mask"]
    log_ratio = torch.where(mask, batch["log_probs"] - batch["old_log_probs"], 0.0)
    if isinstance(config, GspoConfig):
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)).expand_as(log_ratio)
    beyond = mask & (batch["advantages"] < 0) & (log_ratio > math.log(1.5))
    metrics = policy_loss_on_rows(**batch, config=config).metrics
    assert metrics["fipo/dual_clip_fraction"] == pytest.approx(int(beyond.sum()) / int(mask.sum()), rel=1e-12)
    assert beyond.any()
