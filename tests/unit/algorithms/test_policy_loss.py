import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithms.losses import fipo_loss, policy_loss_on_rows
from megatron_fipo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.baselines import DapoConfig, GrpoConfig
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import render_metrics
from tests.unit.algorithms.responses import pack, random_responses, response, update

TIS = RolloutCorrectionConfig(kind="truncate", high=2.0)
AGGREGATIONS = ["token_mean", "sequence_mean", "official_micro_batch"]


def test_hand_computed_example():
    """The example of docs/algorithm.md."""
    ratios = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    old_log_probs = torch.full((1, 4), -2.0, dtype=torch.float64)
    log_probs = (old_log_probs + ratios.log()).requires_grad_()
    config = FipoConfig(
        decay_half_life_tokens=1.0,
        influence_clip_low=0.8,
        influence_clip_high=1.2,
        safety_threshold=1.9,
        dual_clip=3.0,
    )
    result = fipo_loss(log_probs, old_log_probs, torch.tensor([-1.0]), torch.ones(1, 4, dtype=torch.bool), config)
    result.loss.backward()

    future_kl = torch.tensor([[0.25, 0.5, -1.0, 0.0]], dtype=torch.float64) * math.log(2)
    torch.testing.assert_close(result.future_kl, future_kl, rtol=0, atol=1e-12)
    weights = torch.tensor([[2**0.25, 1.0, 0.8, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(result.influence_weights, weights, rtol=0, atol=1e-12)
    assert float(result.loss.detach()) == pytest.approx((2**0.25 + 2.0 + 0.64 + 3.0) / 4, abs=1e-12)
    gradient = torch.tensor([[2**0.25, 2.0, 0.0, 0.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(log_probs.grad, gradient, rtol=0, atol=1e-12)
    assert result.loss_mask.all()
    assert result.metrics["fipo/dual_clip_fraction"] == 0.25


def rows(seed: int = 0, spread: float = 0.3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(5, 40, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 40), (3, 30), (10, 11), (5, 25), (20, 40)]):
        mask[row, start:end] = True
    old = -torch.rand(5, 40, generator=generator) * 3
    return {
        "log_probs": (old + spread * torch.randn(5, 40, generator=generator)).to(dtype).requires_grad_(),
        "old_log_probs": old.to(dtype),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.2, 0.0]),
        "response_mask": mask,
    }


@pytest.mark.parametrize("preset", ["official-32b", "official-7b", "paper-v1", "paper-v2"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_policy_fipo_is_dapo_bit_for_bit(preset, aggregation):
    batch = rows(spread=0.0)
    dapo = policy_loss_on_rows(**batch, config=DapoConfig(aggregation=aggregation))
    (dapo_gradient,) = torch.autograd.grad(dapo.loss, batch["log_probs"])
    fipo = fipo_loss(**batch, config=FipoConfig.preset(preset, aggregation=aggregation))
    (fipo_gradient,) = torch.autograd.grad(fipo.loss, batch["log_probs"])
    assert torch.equal(fipo.loss, dapo.loss)
    assert torch.equal(fipo_gradient, dapo_gradient)
    assert fipo_gradient.any()
    assert fipo.metrics["fipo/fraction_changed"] == 0.0
    assert fipo.metrics["fipo/future_kl_square_mean"] == 0.0


def test_weights_change_the_loss_off_policy():
    batch = rows()
    fipo = fipo_loss(**batch, config=FipoConfig())
    assert fipo.loss != policy_loss_on_rows(**batch, config=DapoConfig()).loss
    pinned = FipoConfig(influence_clip_low=1.0, influence_clip_high=1.0)
    assert torch.equal(fipo_loss(**batch, config=pinned).loss, policy_loss_on_rows(**batch, config=DapoConfig()).loss)


def test_dapo_is_the_textbook_clipped_objective():
    batch = rows(spread=0.5)
    result = policy_loss_on_rows(**batch, config=DapoConfig())
    ratio = (batch["log_probs"] - batch["old_log_probs"]).exp()
    advantages = batch["advantages"][:, None].expand_as(ratio)
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    expected = -objective[batch["response_mask"]].mean()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result.loss, batch["log_probs"])[0],
        torch.autograd.grad(expected, batch["log_probs"])[0],
    )
    assert not result.future_kl.any() and (result.influence_weights == 1).all()
    assert not any(key.startswith("fipo/influence") for key in result.metrics)


def test_grpo_averages_sequences_with_a_symmetric_clip():
    batch = rows(spread=0.5)
    result = policy_loss_on_rows(**batch, config=GrpoConfig())
    ratio = (batch["log_probs"] - batch["old_log_probs"]).exp()
    advantages = batch["advantages"][:, None].expand_as(ratio)
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    mask = batch["response_mask"]
    means = [-(objective[row][mask[row]]).mean() for row in range(5)]
    torch.testing.assert_close(result.loss, torch.stack(means).mean())
    assert "fipo/dual_clip_fraction" not in result.metrics


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    shift = math.log(50.0)
    batch = {
        "log_probs": torch.tensor([[-1.0 + shift], [-1.0 + shift]]).requires_grad_(),
        "old_log_probs": torch.tensor([[-1.0], [-1.0]]),
        "advantages": torch.tensor([-2.0, 2.0]),
        "response_mask": torch.ones(2, 1, dtype=torch.bool),
    }
    result = policy_loss_on_rows(**batch, config=DapoConfig(dual_clip=10.0))
    assert float(result.loss.detach()) == pytest.approx((10.0 * 2.0 - 1.28 * 2.0) / 2)
    without = policy_loss_on_rows(**batch, config=DapoConfig(dual_clip=None))
    assert float(without.loss.detach()) == pytest.approx((50.0 * 2.0 - 1.28 * 2.0) / 2, rel=1e-5)


def drop_batch(num_clipped: int, advantage: float) -> dict[str, torch.Tensor]:
    """Two rows of 4 and 2 tokens; `num_clipped` of the first row's ratios are 20."""
    shift = torch.zeros(2, 4)
    shift[0, :num_clipped] = math.log(20.0)
    return {
        "log_probs": (shift - 1.0).requires_grad_(),
        "old_log_probs": torch.full((2, 4), -1.0),
        "advantages": torch.tensor([advantage, 3.0]),
        "response_mask": torch.tensor([[True] * 4, [True, True, False, False]]),
    }


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_dropped_sequence_leaves_loss_denominator_and_mask(aggregation):
    batch = drop_batch(num_clipped=2, advantage=-1.0)
    result = fipo_loss(**batch, config=FipoConfig(aggregation=aggregation))
    result.loss.backward()
    # Two tokens of ratio 1 and advantage 3 are left. The official mode still counts two samples, but scales
    # the mean by the same two.
    assert float(result.loss.detach()) == pytest.approx(-3.0)
    assert result.loss_mask.tolist() == [[False] * 4, [True, True, False, False]]
    assert not batch["log_probs"].grad[0].any() and batch["log_probs"].grad[1, :2].all()
    assert result.metrics["fipo/dropped_sequences"] == 1.0
    assert result.metrics["fipo/dual_clip_fraction"] == pytest.approx(2 / 6)
    assert result.metrics["train/loss"] == pytest.approx(-3.0)


@pytest.mark.parametrize(
    ("num_clipped", "advantage", "values"),
    [
        (1, -1.0, {}),
        (2, 1.0, {}),
        (2, -1.0, {"sequence_drop": False}),
        (2, -1.0, {"sequence_drop_max_clipped_tokens": 2}),
        (2, -1.0, {"dual_clip": 21.0}),
    ],
)
def test_a_sequence_is_kept(num_clipped, advantage, values):
    result = fipo_loss(**drop_batch(num_clipped, advantage), config=FipoConfig(**values))
    assert result.metrics["fipo/dropped_sequences"] == 0.0
    assert result.loss_mask.sum() == 6


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_sequences_dropped_gives_zero(aggregation):
    config = FipoConfig(aggregation=aggregation)
    inputs = pack([response([3.0, 3.0], -1.0)] * 2)
    output = policy_loss(inputs, config)
    output.numerator.backward()
    assert float(output.numerator.detach()) == 0.0
    assert int(output.denominator) == (2 if aggregation == "official_micro_batch" else 0)
    assert not inputs.log_probs.grad.any()
    batch = drop_batch(num_clipped=3, advantage=-1.0)
    batch["response_mask"][1] = False
    result = fipo_loss(**batch, config=config)
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    assert not batch["log_probs"].grad.any()
    assert "train/loss" not in result.metrics


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("section", [FipoConfig, DapoConfig, GrpoConfig])
def test_nothing_but_filler_gives_zero(section, aggregation):
    inputs = LossInputs(
        log_probs=torch.full((8,), math.nan, requires_grad=True),
        old_log_probs=torch.full((8,), math.nan),
        advantages=torch.full((8,), math.nan),
        response_mask=torch.zeros(8, dtype=torch.bool),
        response_lengths=torch.zeros(2, dtype=torch.int64),
        layout=PackLayout((4, 4)),
    )
    output = policy_loss(inputs, section(aggregation=aggregation))
    output.numerator.backward()
    assert float(output.numerator.detach()) == 0.0 and int(output.denominator) == 0
    assert output.denominator.dtype == torch.int64
    assert not inputs.log_probs.grad.any()


@pytest.mark.parametrize("section", [FipoConfig, DapoConfig, GrpoConfig])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_lies_outside_the_mask_is_never_read(section, garbage):
    config = section(rollout_correction=TIS)
    batch = rows()
    rollout = batch["old_log_probs"] + 0.1
    clean = _LOSSES[section](**batch, config=config, rollout_log_probs=rollout)
    (clean_gradient,) = torch.autograd.grad(clean.loss, batch["log_probs"])
    outside = ~batch["response_mask"]
    for key in ("log_probs", "old_log_probs"):
        batch[key] = batch[key].detach().masked_fill(outside, garbage)
    batch["advantages"] = batch["advantages"][:, None].expand(5, 40).masked_fill(outside, garbage)
    batch["log_probs"].requires_grad_()
    dirty = _LOSSES[section](**batch, config=config, rollout_log_probs=rollout.masked_fill(outside, garbage))
    (dirty_gradient,) = torch.autograd.grad(dirty.loss, batch["log_probs"])
    assert torch.equal(clean.loss, dirty.loss)
    assert torch.equal(clean_gradient, dirty_gradient)
    assert torch.equal(clean.future_kl, dirty.future_kl)
    assert clean.metrics == dirty.metrics


_LOSSES = {FipoConfig: fipo_loss, DapoConfig: policy_loss_on_rows, GrpoConfig: policy_loss_on_rows}


@pytest.mark.parametrize("section", [FipoConfig, DapoConfig, GrpoConfig])
@pytest.mark.parametrize("where", ["log_probs", "old_log_probs", "advantages", "rollout_log_probs"])
def test_nan_on_a_response_token_surfaces(section, where):
    batch = rows()
    batch["advantages"] = batch["advantages"][:, None].expand(5, 40).clone()
    batch["rollout_log_probs"] = batch["old_log_probs"].clone()
    batch[where] = batch[where].detach().clone()
    batch[where][1, 20] = math.nan
    result = _LOSSES[section](**batch, config=section(rollout_correction=TIS))
    assert math.isnan(float(result.loss.detach()))


def test_nan_in_a_dropped_sequence_surfaces():
    batch = drop_batch(num_clipped=3, advantage=-1.0)
    batch["log_probs"] = batch["log_probs"].detach()
    batch["log_probs"][0, 3] = math.nan
    result = fipo_loss(**batch, config=FipoConfig())
    assert result.metrics["fipo/dropped_sequences"] == 1.0
    assert math.isnan(float(result.loss.detach()))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(seed=st.integers(0, 999), prompt=st.integers(0, 70), padding=st.integers(0, 70))
@settings(max_examples=20, deadline=None)
def test_prompt_and_padding_change_nothing(aggregation, seed, prompt, padding):
    config = FipoConfig.preset("official-7b", aggregation=aggregation)
    responses = random_responses(4, seed)
    plain = update([pack(responses, prompt=0, padding=0)], config)
    padded = update([pack(responses, prompt=prompt, padding=padding)], config)
    assert padded[0] == pytest.approx(plain[0], rel=1e-13, abs=1e-15)
    assert padded[1] == pytest.approx(plain[1], rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@given(data=st.data(), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_micro_batch_split_and_order_change_nothing(aggregation, data, seed):
    config = FipoConfig.preset("official-7b", aggregation=aggregation)
    responses = random_responses(6, seed)
    whole_loss, whole_gradient, whole_metrics, _ = update([pack(responses)], config)
    order = data.draw(st.permutations(range(6)))
    cut = data.draw(st.integers(1, 5))
    parts = [[responses[i] for i in order[:cut]], [responses[i] for i in order[cut:]]]
    loss, gradient, metrics, _ = update([pack(part) for part in parts], config)
    assert loss == pytest.approx(whole_loss, rel=1e-12, abs=1e-14)
    lengths = [len(one.log_probs) for one in responses]
    pieces = torch.tensor(whole_gradient, dtype=torch.float64).split(lengths)
    reordered = torch.cat([pieces[i] for i in order]).tolist()
    assert gradient == pytest.approx(reordered, rel=1e-12, abs=1e-14)
    assert metrics == pytest.approx(whole_metrics, rel=1e-12, abs=1e-12)


def test_official_averaging_depends_on_the_partition_and_token_mean_does_not():
    responses = random_responses(6, seed=11)
    losses = {}
    for aggregation in AGGREGATIONS:
        config = FipoConfig(aggregation=aggregation)
        whole = update([pack(responses)], config)[0]
        split = update([pack(responses[:2]), pack(responses[2:])], config)[0]
        losses[aggregation] = abs(whole - split)
    assert losses["official_micro_batch"] > 1e-4
    assert losses["token_mean"] < 1e-12 and losses["sequence_mean"] < 1e-12


def test_truncated_rollout_importance_scales_the_loss_but_not_the_future_kl():
    batch = rows()
    plain = fipo_loss(**batch, config=FipoConfig())
    rollout = batch["old_log_probs"] - math.log(1.5)
    scaled = fipo_loss(**batch, config=FipoConfig(rollout_correction=TIS), rollout_log_probs=rollout)
    capped = fipo_loss(**batch, config=FipoConfig(rollout_correction=TIS), rollout_log_probs=rollout - 5.0)
    torch.testing.assert_close(scaled.loss, 1.5 * plain.loss)
    torch.testing.assert_close(capped.loss, 2.0 * plain.loss)
    assert torch.equal(scaled.future_kl, plain.future_kl)
    assert scaled.metrics["train/rollout_importance_mean"] == pytest.approx(1.5, rel=1e-5)
    assert scaled.metrics["train/mismatch_mean_abs"] == pytest.approx(math.log(1.5), rel=1e-5)
    assert scaled.metrics["train/mismatch_kl"] == pytest.approx(-math.log(1.5), rel=1e-5)
    measured = fipo_loss(**batch, config=FipoConfig(), rollout_log_probs=rollout)
    assert torch.equal(measured.loss, plain.loss)
    assert "train/rollout_importance_mean" not in measured.metrics


def test_bfloat16_log_probs_are_computed_in_float32():
    batch = rows(dtype=torch.bfloat16)
    result = fipo_loss(**batch, config=FipoConfig(), rollout_log_probs=None)
    exact = {key: value.detach().float() if value.is_floating_point() else value for key, value in batch.items()}
    assert result.loss.dtype == torch.float32 and result.future_kl.dtype == torch.float32
    assert torch.equal(result.loss, fipo_loss(**exact, config=FipoConfig()).loss)


def test_extreme_log_ratios_stay_finite():
    batch = rows()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None].expand(5, 40)
    batch["log_probs"] = (100.0 * signs - 100.0).requires_grad_()
    batch["old_log_probs"] = -100.0 * signs - 100.0
    for preset in ("official-32b", "paper-v1"):
        config = FipoConfig.preset(preset, participation_mask="none", decay_half_life_tokens=math.inf)
        result = fipo_loss(**batch, config=config)
        (gradient,) = torch.autograd.grad(result.loss, batch["log_probs"])
        assert float(result.future_kl.max()) == 800.0 and float(result.future_kl.min()) < -500.0
        assert result.loss.isfinite() and gradient.isfinite().all()
        assert all(math.isfinite(value) for value in result.metrics.values())


def test_clamped_log_ratios_have_no_gradient():
    batch = rows()
    batch["log_probs"] = (batch["old_log_probs"] - 25.0).requires_grad_()
    batch["advantages"] = torch.ones(5)
    result = policy_loss_on_rows(**batch, config=DapoConfig())
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(-math.exp(-20.0), rel=1e-5)
    assert not batch["log_probs"].grad.any()


def test_metrics_by_hand():
    ratios = torch.tensor([1.5, 0.5, 1.0, 2.0], dtype=torch.float64)
    config = FipoConfig(decay_half_life_tokens=1e-3, influence_clip_low=0.8, dual_clip=4.0)
    inputs = LossInputs(
        log_probs=ratios.log().requires_grad_(),
        old_log_probs=torch.zeros(4, dtype=torch.float64),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64),
        response_mask=torch.tensor([True, True, True, True]),
        response_lengths=torch.tensor([4]),
        layout=PackLayout((4,)),
        entropy=torch.tensor([1.0, 2.0, 3.0, 6.0]),
    )
    # With this half-life F is the token's own log-ratio, so the raw weight is its ratio.
    assert render_metrics(policy_loss(inputs, config).metrics) == pytest.approx(
        {
            "train/loss": (-1.2 * 1.28 + 0.8 * 0.8 - 1.0 + 1.2 * 2.0) / 4,
            "train/policy_kl": -math.log(1.5) / 4,
            "train/log_ratio_abs_max": math.log(2.0),
            "train/policy_kl_k3": (5.0 - 4.0 - math.log(1.5)) / 4,
            "train/ratio_mean": 1.25,
            "train/ratio_max": 2.0,
            "train/ratio_negative_p75": 2.0,
            "train/ratio_negative_p995": 2.0,
            "train/ratio_negative_p999": 2.0,
            "train/ratio_negative_max": 2.0,
            "train/ratio_negative_count_2_3": 1.0,
            "train/ratio_negative_count_3_4": 0.0,
            "train/ratio_negative_count_4_c": 0.0,
            "train/ratio_positive_min": 1.0,
            "train/ratio_positive_p25": 1.0,
            "train/ratio_positive_p50": 1.0,
            "train/ratio_positive_p75": 1.5,
            "train/ratio_positive_p995": 1.5,
            "train/ratio_positive_p999": 1.5,
            "train/ratio_positive_max": 1.5,
            "train/ratio_positive_fraction_below_1e3": 0.0,
            "train/clip_fraction_low": 0.25,
            "train/clip_fraction_high": 0.25,
            "train/length_weighted_advantage": 0.0,
            "train/entropy": 3.0,
            "fipo/dual_clip_fraction": 0.0,
            "fipo/future_kl_mean": math.log(1.5) / 4,
            "fipo/future_kl_square_mean": (math.log(1.5) ** 2 + 2 * math.log(2) ** 2) / 4,
            "fipo/influence_weight_mean": (1.2 + 0.8 + 1.0 + 1.2) / 4,
            "fipo/influence_weight_min": 0.8,
            "fipo/influence_weight_p01": 0.8,
            "fipo/influence_weight_p25": 0.8,
            "fipo/influence_weight_p50": 1.0,
            "fipo/influence_weight_p75": 1.2,
            "fipo/influence_weight_p99": 1.2,
            "fipo/influence_weight_p999": 1.2,
            "fipo/influence_weight_max": 1.2,
            "fipo/influence_raw_mean": 1.25,
            "fipo/influence_raw_min": 0.5,
            "fipo/influence_raw_p01": 0.5,
            "fipo/influence_raw_p25": 0.5,
            "fipo/influence_raw_p50": 1.0,
            "fipo/influence_raw_p75": 1.5,
            "fipo/influence_raw_p99": 2.0,
            "fipo/influence_raw_p999": 2.0,
            "fipo/influence_raw_max": 2.0,
            "fipo/fraction_changed": 0.75,
            "fipo/fraction_at_lower_bound": 0.25,
            "fipo/fraction_at_upper_bound": 0.5,
            "fipo/step_size_ratio": (1.2 + 0.8 + 1.0 + 1.2) / 4,
            "fipo/dropped_sequences": 0.0,
        }
    )


def test_a_weight_of_one_is_not_at_a_bound():
    batch = rows(spread=0.3)
    metrics = fipo_loss(**batch, config=FipoConfig.preset("official-32b")).metrics
    assert metrics["fipo/fraction_at_lower_bound"] == 0.0
    assert 0 < metrics["fipo/fraction_at_upper_bound"] <= metrics["fipo/fraction_changed"] < 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("old_log_probs", torch.zeros(3), r"old_log_probs.shape = \(3,\): the layout holds 4 tokens"),
        ("entropy", torch.zeros(2, 2), r"entropy.shape = \(2, 2\)"),
        ("response_lengths", torch.zeros(1, dtype=torch.int64), "the layout has 2 sequences"),
        ("response_mask", torch.ones(4), "response_mask.dtype = torch.float32: must be torch.bool"),
        ("rollout_log_probs", None, "rollout_correction.kind = truncate needs them"),
        ("layout", PackLayout((4, 4), cp_size=2), "group = None: the layout has cp_size = 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, value, message):
    inputs = {
        "log_probs": torch.zeros(4),
        "old_log_probs": torch.zeros(4),
        "advantages": torch.zeros(4),
        "response_mask": torch.ones(4, dtype=torch.bool),
        "response_lengths": torch.tensor([2, 2]),
        "layout": PackLayout((2, 2)),
        "rollout_log_probs": torch.zeros(4),
    }
    inputs[name] = value
    with pytest.raises(ValueError, match=message):
        policy_loss(LossInputs(**inputs), FipoConfig(rollout_correction=TIS))


def test_flat_rows_are_refused():
    flat = torch.zeros(4)
    with pytest.raises(ValueError, match=r"log_probs.shape = \(4,\): must be \[B, T\]"):
        fipo_loss(flat, flat, flat, flat.bool(), FipoConfig())
