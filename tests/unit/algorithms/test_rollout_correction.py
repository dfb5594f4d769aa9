"""Corrections for the mismatch of trainer and engine: the factor's definition, its gradient, its limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithms.losses import PolicyLoss, policy_loss_on_rows
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig, GspoConfig
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig
from tests.unit.algorithms.baseline_formulas import Rows, rows

TIS = RolloutCorrectionConfig(kind="truncate", high=1.3)
ICEPOP = RolloutCorrectionConfig(kind="mask", low=0.8, high=1.3)
MIS = RolloutCorrectionConfig(kind="mask", high=1.3)
CORRECTIONS = [replace(correction, level=level) for correction in (TIS, ICEPOP, MIS) for level in ("token", "sequence")]
ALGORITHMS: list[AlgorithmConfig] = [
    FipoConfig.preset("official-7b", dual_clip=3.0),
    FipoConfig.preset("paper-v2"),
    DapoConfig(aggregation="sequence_mean"),
    GspoConfig(),
]


def batch_of(seed: int, mismatch: float) -> tuple[Rows, torch.Tensor]:
    batch = rows(seed, 0.3, 5)
    draws = torch.Generator().manual_seed(seed)
    shape = batch["old_log_probs"].shape
    noise = torch.randn(shape, generator=draws, dtype=torch.float64) + torch.randn(5, 1, generator=draws)
    return batch, batch["old_log_probs"] + mismatch * noise


def loss_with(
    batch: Rows, rollout: torch.Tensor, config: AlgorithmConfig, correction: RolloutCorrectionConfig
) -> tuple[PolicyLoss, torch.Tensor]:
    result = policy_loss_on_rows(
        **batch, config=replace(config, rollout_correction=correction), rollout_log_probs=rollout
    )
    (gradient,) = torch.autograd.grad(result.loss, batch["log_probs"])
    return result, gradient


def factors(batch: Rows, rollout: torch.Tensor, correction: RolloutCorrectionConfig) -> np.ndarray:
    """The definition, response by response in NumPy; 1 outside responses."""
    mask = batch["response_mask"].numpy()
    found = np.ones(mask.shape)
    for row, chosen in enumerate(mask):
        k = np.exp((batch["old_log_probs"] - rollout).numpy()[row][chosen])
        if correction.level == "sequence" and len(k):
            k = np.full(len(k), np.prod(k) ** (1 / len(k)))
        if correction.kind == "truncate":
            found[row, chosen] = np.minimum(k, correction.high)
        else:
            found[row, chosen] = np.where((k >= correction.low) & (k <= correction.high), k, 0.0)
    return found


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda each: f"{each.kind}-{each.level}-{each.low}")
@pytest.mark.parametrize("config", ALGORITHMS, ids=lambda each: f"{each.type}-{each.aggregation}")
@given(seed=st.integers(0, 2**16), mismatch=st.sampled_from([0.0, 0.01, 0.3, 2.0]))
@settings(max_examples=6, deadline=None)
def test_every_tokens_gradient_is_multiplied_by_its_factor(
    config: AlgorithmConfig, correction: RolloutCorrectionConfig, seed: int, mismatch: float
) -> None:
    """And by nothing else: the denominator, the drops, the Future-KL and the weights are those without a correction."""
    batch, rollout = batch_of(seed, mismatch)
    plain, gradient = loss_with(batch, rollout, config, RolloutCorrectionConfig())
    corrected, scaled = loss_with(batch, rollout, config, correction)
    expected = factors(batch, rollout, correction)
    np.testing.assert_allclose(scaled.numpy(), gradient.numpy() * expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(corrected.future_kl, plain.future_kl)
    assert torch.equal(corrected.influence_weights, plain.influence_weights)
    assert torch.equal(corrected.loss_mask, plain.loss_mask & torch.from_numpy(expected != 0))
    mask = batch["response_mask"].numpy()
    assert corrected.metrics["train/rollout_importance_mean"] == pytest.approx(expected[mask].mean(), rel=1e-9)
    assert "train/rollout_importance_mean" not in plain.metrics


def test_the_value_is_worked_by_hand() -> None:
    """k = 1/2, 1, 2 and 4 on a first update: the loss of a token is −A times its factor, over all four tokens."""
    old = torch.full((1, 4), -1.0, dtype=torch.float64)
    batch = {
        "log_probs": old.clone().requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.tensor([3.0], dtype=torch.float64),
        "response_mask": torch.ones(1, 4, dtype=torch.bool),
    }
    rollout = old - torch.tensor([[0.5, 1.0, 2.0, 4.0]], dtype=torch.float64).log()
    expected = {
        RolloutCorrectionConfig(kind="truncate", high=2.0): [0.5, 1.0, 2.0, 2.0],
        RolloutCorrectionConfig(kind="mask", low=0.6, high=2.0): [0.0, 1.0, 2.0, 0.0],
        RolloutCorrectionConfig(kind="mask", high=2.0): [0.5, 1.0, 2.0, 0.0],
        # The geometric mean is √2.
        RolloutCorrectionConfig(kind="truncate", level="sequence", high=1.25): [1.25] * 4,
        RolloutCorrectionConfig(kind="mask", level="sequence", high=1.5): [math.sqrt(2)] * 4,
        RolloutCorrectionConfig(kind="mask", level="sequence", high=1.25): [0.0] * 4,
    }
    for correction, factor in expected.items():
        result, gradient = loss_with(batch, rollout, DapoConfig(), correction)
        assert float(result.loss.detach()) == pytest.approx(-3.0 * sum(factor) / 4, rel=1e-12), correction
        assert gradient[0].tolist() == pytest.approx([-3.0 * each / 4 for each in factor], rel=1e-12), correction


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda each: f"{each.kind}-{each.level}-{each.low}")
@pytest.mark.parametrize("config", ALGORITHMS, ids=lambda each: f"{each.type}-{each.aggregation}")
def test_an_engine_that_agrees_is_not_corrected(config: AlgorithmConfig, correction: RolloutCorrectionConfig) -> None:
    batch, _ = batch_of(3, 0.0)
    plain, gradient = loss_with(batch, batch["old_log_probs"], config, RolloutCorrectionConfig())
    corrected, same = loss_with(batch, batch["old_log_probs"], config, correction)
    assert torch.equal(corrected.loss, plain.loss) and torch.equal(same, gradient)
    assert corrected.metrics["train/rollout_importance_mean"] == 1.0
    assert corrected.metrics["train/rollout_corrected_fraction"] == 0.0


@pytest.mark.parametrize("correction", [TIS, ICEPOP, replace(ICEPOP, level="sequence")])
@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_a_probability_of_zero_at_either_end_is_bounded(correction: RolloutCorrectionConfig, value: float) -> None:
    batch, rollout = batch_of(4, 0.01)
    row, column = batch["response_mask"].nonzero()[0].tolist()
    rollout[row, column] = value
    result, gradient = loss_with(batch, rollout, DapoConfig(), correction)
    assert result.loss.isfinite() and gradient.isfinite().all()
    assert result.metrics["train/rollout_corrected_fraction"] > 0 or value == math.inf


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda each: f"{each.kind}-{each.level}-{each.low}")
def test_a_nan_is_not_masked_away(correction: RolloutCorrectionConfig) -> None:
    batch, rollout = batch_of(5, 0.01)
    row, column = batch["response_mask"].nonzero()[0].tolist()
    rollout[row, column] = math.nan
    result, _ = loss_with(batch, rollout, DapoConfig(), correction)
    assert result.loss.isnan()


def test_where_all_is_masked_there_is_nothing_to_learn() -> None:
    batch, _ = batch_of(6, 0.0)
    result, gradient = loss_with(batch, batch["old_log_probs"] - 5.0, FipoConfig.preset("paper-v2"), ICEPOP)
    assert not result.loss_mask.any()
    assert float(result.loss.detach()) == 0.0 and not gradient.any()
    assert result.metrics["train/rollout_corrected_fraction"] == 1.0
