"""What the loss reports, value by value, against NumPy on the same tokens."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_fipo.algorithms.losses import fipo_loss, policy_loss_on_rows
from megatron_fipo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig, GrpoConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import Distribution, Metrics, merge_metrics, quantile_suffix, render_metrics


def tokens(ratios: list[float], advantages: list[float], mask: list[bool] | None = None) -> dict[str, torch.Tensor]:
    """One row of tokens with these ratios."""
    values = torch.tensor([ratios], dtype=torch.float64)
    return {
        "log_probs": values.log().requires_grad_(),
        "old_log_probs": torch.zeros_like(values),
        "advantages": torch.tensor([advantages], dtype=torch.float64),
        "response_mask": torch.tensor([mask or [True] * len(ratios)]),
    }


def nearest_rank(values: np.ndarray, level: int) -> float:
    return float(np.sort(values.astype(np.float32))[math.ceil(level * len(values) / 1000) - 1])


def micro_batch(seed: int, lengths: tuple[int, ...], sign: float = 0.0) -> LossInputs:
    """Random tokens; `sign` gives all of them an advantage of that sign."""
    draws = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def noise() -> torch.Tensor:
        return torch.randn(count, generator=draws, dtype=torch.float64)

    old, advantages = -noise().abs(), noise()
    return LossInputs(
        log_probs=(old + 0.4 * noise()).requires_grad_(),
        old_log_probs=old,
        advantages=advantages.abs() * sign if sign else advantages,
        response_mask=torch.ones(count, dtype=torch.bool),
        response_lengths=torch.tensor(lengths),
        layout=PackLayout(lengths),
        rollout_log_probs=old + 0.01 * noise(),
        entropy=noise().abs(),
    )


def test_ratios_are_told_apart_by_the_sign_of_the_advantage() -> None:
    draws = np.random.default_rng(0)
    ratios = np.exp(draws.normal(0, 1, 4000))
    advantages = draws.choice([-1.0, 0.0, 1.0], 4000)
    mask = draws.random(4000) < 0.9
    metrics = policy_loss_on_rows(
        **tokens(ratios.tolist(), advantages.tolist(), mask.tolist()), config=DapoConfig()
    ).metrics
    negative, positive = ratios[mask & (advantages < 0)], ratios[mask & (advantages > 0)]
    for level in (750, 995, 999):
        key = f"train/ratio_negative_{quantile_suffix(level)}"
        assert metrics[key] == pytest.approx(nearest_rank(negative, level), rel=1e-6), key
    for level in (250, 500, 750, 995, 999):
        key = f"train/ratio_positive_{quantile_suffix(level)}"
        assert metrics[key] == pytest.approx(nearest_rank(positive, level), rel=1e-6), key
    assert metrics["train/ratio_negative_max"] == pytest.approx(negative.max(), rel=1e-12)
    assert metrics["train/ratio_positive_min"] == pytest.approx(positive.min(), rel=1e-12)
    assert metrics["train/ratio_positive_max"] == pytest.approx(positive.max(), rel=1e-12)


def test_counts_of_large_ratios_end_at_the_dual_clip() -> None:
    ratios = [1.9, 2.1, 2.9, 3.1, 3.5, 3.9, 4.1, 9.9, 10.1, 50.0]
    keys = [f"train/ratio_negative_count_{name}" for name in ("2_3", "3_4", "4_c")]

    def counts(sign: float, dual_clip: float | None) -> list[float]:
        metrics = policy_loss_on_rows(
            **tokens(ratios, [sign] * len(ratios)), config=DapoConfig(dual_clip=dual_clip)
        ).metrics
        return [metrics[key] for key in keys]

    assert counts(-1.0, 10.0) == [2, 3, 2]
    assert counts(-1.0, None) == [2, 3, 4]
    assert counts(1.0, 10.0) == [0, 0, 0]


def test_the_fraction_of_vanishing_ratios_is_of_positive_tokens() -> None:
    batch = tokens([1e-4, 9e-4, 0.5, 1e-5, 1.0], [1.0, 1.0, 1.0, -1.0, 2.0])
    metrics = policy_loss_on_rows(**batch, config=DapoConfig()).metrics
    assert metrics["train/ratio_positive_fraction_below_1e3"] == 0.5


def test_a_sign_that_does_not_occur_has_no_metrics() -> None:
    metrics = policy_loss_on_rows(**tokens([0.5, 2.0], [1.0, 1.0]), config=DapoConfig()).metrics
    assert {key for key in metrics if "negative" in key} == {
        f"train/ratio_negative_count_{name}" for name in ("2_3", "3_4", "4_c")
    }
    assert metrics["train/ratio_positive_max"] == pytest.approx(2.0)


def test_both_estimators_of_the_kl() -> None:
    metrics = policy_loss_on_rows(**tokens([0.5, 2.0, 1.0], [1.0, -1.0, 1.0]), config=DapoConfig()).metrics
    assert metrics["train/policy_kl"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["train/policy_kl_k3"] == pytest.approx((0.5 + 2.0 + 1.0 - 3.0) / 3)


def test_mismatch_is_seen_from_the_rollout() -> None:
    batch = tokens([1.0, 1.0], [1.0, 1.0]) | {"rollout_log_probs": torch.tensor([[math.log(2), -math.log(4)]])}
    metrics = policy_loss_on_rows(**batch, config=DapoConfig()).metrics
    assert metrics["train/mismatch_mean_abs"] == pytest.approx(1.5 * math.log(2))
    assert metrics["train/mismatch_max"] == pytest.approx(2 * math.log(2))
    assert metrics["train/mismatch_kl"] == pytest.approx(-0.5 * math.log(2))
    # π_old / π_rollout is 1/2 and 4.
    assert metrics["train/mismatch_kl_k3"] == pytest.approx((0.5 + 4.0 - 2.0 - math.log(2)) / 2)


def test_the_step_size_ratio_weighs_by_the_advantage_and_leaves_dropped_sequences_out() -> None:
    config = FipoConfig(
        decay_half_life_tokens=1e-3,
        influence_clip_low=0.5,
        influence_clip_high=1.5,
        dual_clip=3.0,
        safety_threshold=9.0,
    )
    # With this half-life the raw weight is the ratio.
    kept = tokens([1.25, 0.75], [3.0, 1.0])
    assert fipo_loss(**kept, config=config).metrics["fipo/step_size_ratio"] == pytest.approx((3.75 + 0.75) / 4)
    dropped = tokens([8.0, 8.0], [-5.0, -5.0])
    both = {name: torch.cat([kept[name].detach(), dropped[name].detach()]) for name in kept}
    metrics = fipo_loss(**both, config=config).metrics
    assert metrics["fipo/dropped_sequences"] == 1
    assert metrics["fipo/step_size_ratio"] == pytest.approx((3.75 + 0.75) / 4)


def test_a_weight_of_one_counts_as_clipped_at_no_bound() -> None:
    """One-sided clip: every token with F ≤ 0 has f = 1, which is the lower bound and changes nothing."""
    config = FipoConfig.preset("official-32b")
    assert config.influence_clip_low == 1.0
    unmoved = fipo_loss(**tokens([1.0] * 8, [1.0] * 8), config=config).metrics
    assert (unmoved["fipo/fraction_at_lower_bound"], unmoved["fipo/fraction_at_upper_bound"]) == (0.0, 0.0)
    falling = fipo_loss(**tokens([0.9] * 8, [1.0] * 8), config=config).metrics
    assert falling["fipo/influence_raw_max"] < 1
    assert falling["fipo/fraction_at_lower_bound"] == falling["fipo/fraction_changed"] == 0.0
    rising = fipo_loss(**tokens([1.5] * 8, [1.0] * 8), config=config).metrics
    assert rising["fipo/fraction_at_upper_bound"] == rising["fipo/fraction_changed"] == 1.0


def test_quantiles_and_means_are_of_all_micro_batches_together() -> None:
    parts = [micro_batch(0, (3,)), micro_batch(1, (500,))]
    outputs = [policy_loss(part, FipoConfig()).metrics for part in parts]
    together = render_metrics(merge_metrics(outputs))
    ratios = np.concatenate([(part.log_probs - part.old_log_probs).detach().exp().numpy() for part in parts])
    advantages = np.concatenate([part.advantages.numpy() for part in parts])
    positive = ratios[advantages > 0]
    assert together["train/ratio_positive_p50"] == pytest.approx(nearest_rank(positive, 500), rel=1e-6)
    assert together["train/ratio_mean"] == pytest.approx(ratios.mean())
    # Averaging the micro-batches' values, as the official code does, gives something else.
    each = [render_metrics(output) for output in outputs]
    averaged = sum(one["train/ratio_positive_p50"] for one in each) / 2
    assert averaged != pytest.approx(together["train/ratio_positive_p50"], rel=1e-3)


@pytest.mark.parametrize("config", [FipoConfig(), DapoConfig(dual_clip=10.0), GrpoConfig()], ids=lambda c: c.type)
def test_every_metric_is_declared_with_the_reduction_it_has(config: AlgorithmConfig) -> None:
    metrics: Metrics = policy_loss(micro_batch(0, (20, 30)), config).metrics
    for key, value in metrics.items():
        if isinstance(value, Distribution):
            declared = {CATALOGUE.find(f"{key}_{quantile_suffix(level)}")[0].reduction for level in value.levels}
            assert declared == {"quantile"}
        else:
            declared = {CATALOGUE.find(key)[0].reduction}
            assert declared in ({value.kind}, {"ratio"}), key
            assert declared != {"ratio"} or value.kind == "mean", key
    assert not CATALOGUE.undeclared(render_metrics(metrics))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_empty_part_raises_nothing_and_changes_nothing(sign: float) -> None:
    """No token, no negative token, nothing in the mask: `.min()` of nothing must not be met anywhere."""
    whole = policy_loss(micro_batch(3, (40,), sign), FipoConfig()).metrics
    masked = dataclasses.replace(
        micro_batch(4, (40,), sign),
        response_mask=torch.zeros(40, dtype=torch.bool),
        response_lengths=torch.zeros(1, dtype=torch.int64),
    )
    nothing = policy_loss(masked, FipoConfig()).metrics
    assert render_metrics(merge_metrics([nothing, whole, nothing])) == render_metrics(whole)
    assert set(render_metrics(nothing)) == {
        "fipo/dropped_sequences",
        *(f"train/ratio_negative_count_{name}" for name in ("2_3", "3_4", "4_c")),
    }
