"""The reference-KL terms, and what their gradients are over all outcomes of small distributions."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fipo.algorithms.losses import policy_loss_on_rows
from megatron_fipo.config.baselines import DapoConfig, DrGrpoConfig, GrpoConfig, SapoConfig
from megatron_fipo.config.policy_gradient import KlEstimator
from tests.unit.algorithms.baseline_formulas import ALGORITHMS, loss_and_gradient, rows

ESTIMATORS: list[KlEstimator] = ["k1", "k2", "k3"]
TERMS = {
    "k1": (lambda d: d, lambda d: np.ones_like(d)),
    "k2": (lambda d: d**2 / 2, lambda d: d),
    "k3": (lambda d: np.exp(-d) - 1 + d, lambda d: 1 - np.exp(-d)),
}
"""Every estimator and its derivative by log π_θ."""


def expected_gradient(logits: Tensor, reference_logits: Tensor, estimator: KlEstimator) -> Tensor:
    """Σ_a π(a) ∇ℓ(a): what the term's gradient is on average over fresh samples of the policy, exactly."""
    log_probs = logits.log_softmax(0)
    samples = log_probs.detach()[:, None].clone().requires_grad_()
    config = DapoConfig(reference_kl_coefficient=1.0, reference_kl_estimator=estimator)
    result = policy_loss_on_rows(
        samples,
        samples.detach(),
        torch.zeros_like(samples),
        torch.ones_like(samples, dtype=torch.bool),
        config,
        reference_log_probs=reference_logits.log_softmax(0)[:, None],
    )
    (slopes,) = torch.autograd.grad(result.loss * len(logits), samples)
    return torch.autograd.grad(log_probs, logits, log_probs.detach().exp() * slopes[:, 0])[0]


def distributions() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    logits, reference = (2 * torch.randn(7, generator=draws, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), reference


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q)."""
    return (log_p.exp() * (log_p - log_q)).sum()


def test_k1_has_no_gradient_on_average() -> None:
    logits, reference = distributions()
    gradient = expected_gradient(logits, reference, "k1")
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_k2_has_the_gradient_of_the_divergence_from_the_reference() -> None:
    logits, reference = distributions()
    value = divergence(logits.log_softmax(0), reference.log_softmax(0))
    (wanted,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(expected_gradient(logits, reference, "k2"), wanted, rtol=1e-12, atol=1e-15)
    assert wanted.norm() > 0.1


def test_k3_has_the_gradient_of_the_divergence_of_the_reference_from_the_policy() -> None:
    """Of KL(π_ref ‖ π_θ), exactly, although its value estimates KL(π_θ ‖ π_ref)."""
    logits, reference = distributions()
    value = divergence(reference.log_softmax(0), logits.log_softmax(0))
    (wanted,) = torch.autograd.grad(value, logits)
    gradient = expected_gradient(logits, reference, "k3")
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, logits.softmax(0).detach() - reference.softmax(0), rtol=1e-12, atol=1e-15)
    assert (gradient - expected_gradient(logits, reference, "k2")).norm() > 0.1


def test_near_the_reference_k2_and_k3_agree_to_first_order() -> None:
    logits, _ = distributions()
    direction = torch.linspace(-1, 1, 7, dtype=torch.float64)
    differences = []
    for size in (1e-2, 1e-3):
        reference = logits.detach() + size * direction
        k2, k3 = (expected_gradient(logits, reference, name) for name in ("k2", "k3"))
        assert k2.norm() > 0.05 * size
        differences.append(float((k2 - k3).norm()))
    assert differences[1] == pytest.approx(differences[0] / 100, rel=0.05)


def test_on_two_tokens_k2_holds_prefix_by_prefix() -> None:
    """A token's term sees its own choice alone, not how it leads to prefixes that lie far from the reference."""
    draws = torch.Generator().manual_seed(1)
    first, reference_first = torch.randn(2, 3, generator=draws, dtype=torch.float64)
    second, reference_second = torch.randn(2, 3, 3, generator=draws, dtype=torch.float64)
    parameters = [first.requires_grad_(), second.requires_grad_()]
    logs, reference_logs = (
        (one.log_softmax(0), two.log_softmax(1)) for one, two in ((first, second), (reference_first, reference_second))
    )
    pairs = list(itertools.product(range(3), repeat=2))

    def on_pairs(logs: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([torch.stack([logs[0][a], logs[1][a, b]]) for a, b in pairs])

    samples = on_pairs(logs).detach().requires_grad_()
    config = DrGrpoConfig(length_divisor=1, reference_kl_coefficient=1.0, reference_kl_estimator="k2")
    _, slopes = loss_and_gradient(
        {
            "log_probs": samples,
            "old_log_probs": samples.detach(),
            "advantages": torch.zeros_like(samples),
            "response_mask": torch.ones_like(samples, dtype=torch.bool),
        },
        config,
        reference_log_probs=on_pairs(reference_logs),
    )
    chances = samples.detach().sum(dim=1, keepdim=True).exp()
    found = torch.autograd.grad(on_pairs(logs), parameters, slopes * len(pairs) * chances, retain_graph=True)

    behind = torch.stack([divergence(logs[1][a], reference_logs[1][a]) for a in range(3)])
    by_prefix = divergence(logs[0], reference_logs[0]) + (logs[0].detach().exp() * behind).sum()
    whole = divergence(logs[0], reference_logs[0]) + (logs[0].exp() * behind).sum()
    for mine, wanted in zip(found, torch.autograd.grad(by_prefix, parameters, retain_graph=True), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-15)
    assert (found[0] - torch.autograd.grad(whole, parameters)[0]).norm() > 1e-2


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("config", [DapoConfig(), GrpoConfig(), DrGrpoConfig(length_divisor=5), SapoConfig()])
def test_the_term_is_added_with_the_averaging_of_the_algorithm(config, estimator) -> None:
    batch = rows(seed=1, spread=0.3)
    mask = batch["response_mask"]
    reference = batch["old_log_probs"] + 0.4 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    coefficient = 0.25
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    with_term = type(config)(**{**values, "reference_kl_coefficient": coefficient, "reference_kl_estimator": estimator})
    plain, without = loss_and_gradient(batch, config)
    result, gradient = loss_and_gradient(batch, with_term, reference_log_probs=reference)
    term, slope = TERMS[estimator]
    difference = (batch["log_probs"].detach() - reference).numpy()
    lengths = mask.sum(dim=1, keepdim=True).numpy()
    weights = {
        "token_mean": np.full(lengths.shape, 1 / lengths.sum()),
        "sequence_mean": 1 / (np.maximum(lengths, 1) * (lengths > 0).sum()),
        "sequence_sum": np.full(lengths.shape, 1 / ((config.length_divisor or 1) * (lengths > 0).sum())),
    }[config.aggregation]
    chosen = mask.numpy()
    assert float((result.loss - plain.loss).detach()) == pytest.approx(
        coefficient * float((weights * term(difference))[chosen].sum()), rel=1e-11
    )
    assert (gradient - without)[mask].tolist() == pytest.approx(
        coefficient * (weights * slope(difference))[chosen], rel=1e-10, abs=1e-15
    )
    assert result.metrics["train/reference_kl"] == pytest.approx(float(difference[chosen].mean()), rel=1e-12)
    k3 = float(np.mean(TERMS["k3"][0](difference[chosen])))
    assert result.metrics["train/reference_kl_k3"] == pytest.approx(k3, rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_at_the_reference_the_term_is_zero_and_only_k1_pulls(estimator: KlEstimator) -> None:
    batch = rows(seed=2, spread=0.3)
    config = DapoConfig(reference_kl_coefficient=0.5, reference_kl_estimator=estimator)
    plain, without = loss_and_gradient(batch, DapoConfig())
    result, gradient = loss_and_gradient(batch, config, reference_log_probs=batch["log_probs"].detach())
    assert torch.equal(result.loss, plain.loss)
    mask = batch["response_mask"]
    pull = 0.5 / int(mask.sum()) if estimator == "k1" else 0.0
    torch.testing.assert_close((gradient - without)[mask], torch.full((int(mask.sum()),), pull).double())
    assert result.metrics["train/reference_kl"] == result.metrics["train/reference_kl_k3"] == 0.0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_a_coefficient_the_reference_is_not_read(name: str) -> None:
    batch = rows(seed=3, spread=0.3)
    plain, without = loss_and_gradient(batch, ALGORITHMS[name])
    nan = torch.full_like(batch["old_log_probs"], float("nan"))
    result, gradient = loss_and_gradient(batch, ALGORITHMS[name], reference_log_probs=nan)
    assert torch.equal(result.loss, plain.loss) and torch.equal(gradient, without)
    assert result.metrics == plain.metrics


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_policy_far_from_the_reference_stays_finite(estimator: KlEstimator) -> None:
    batch = rows(seed=4, spread=0.3, dtype=torch.float32)
    config = DapoConfig(reference_kl_coefficient=1e-3, reference_kl_estimator=estimator)
    for distance in (-500.0, 500.0):
        reference = batch["log_probs"].detach() - distance
        result, gradient = loss_and_gradient(batch, config, reference_log_probs=reference)
        assert result.loss.isfinite() and gradient.isfinite().all()
        assert result.metrics["train/reference_kl"] == pytest.approx(distance, rel=1e-6)
