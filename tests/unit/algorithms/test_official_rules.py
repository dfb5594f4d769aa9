"""The presets against the official rules: loss, gradient, weights, drop decisions and metrics.

Inputs are float64 but in one test, so that package and oracle decide alike at every threshold.
"""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from megatron_fipo.config.algorithm import FipoConfig
from tests.unit.algorithms import oracle
from tests.unit.algorithms.oracle import Response
from tests.unit.algorithms.responses import (
    assert_same,
    exact_log_ratio,
    on_response_tokens,
    pack,
    random_mini_batch,
    response,
    update,
)

PRESETS = ("official-32b", "official-7b", "paper-v1", "paper-v2")
OTHERS = {
    "official, clip ratio 0": FipoConfig.preset("official-7b", influence_clip_low=0.0, influence_clip_high=10.0),
    "paper-v1, 7b": FipoConfig.preset("paper-v1", influence_clip_low=0.8, safety_threshold=3.0),
    "sequence mean": FipoConfig.preset("official-7b", aggregation="sequence_mean", dual_clip=3.0),
    "half-life 1, no filter": FipoConfig(decay_half_life_tokens=1.0, influence_clip_low=0.5, participation_mask="none"),
    "no decay": FipoConfig.preset("official-7b", decay_half_life_tokens=math.inf),
    "γ = 0": FipoConfig.preset("official-7b", decay_half_life_tokens=1e-9),
    "no dual clip": FipoConfig(dual_clip=None, sequence_drop=False, participation_mask="none"),
    "drop at once": FipoConfig(sequence_drop_max_clipped_tokens=0),
}


@lru_cache(maxsize=1)
def random_batches() -> list[list[list[Response]]]:
    return [random_mini_batch(seed) for seed in range(1000)]


def assert_follows(
    micro_batches: list[list[Response]],
    config: FipoConfig,
    *,
    relative: float = 1e-6,
    absolute: float = 1e-12,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Compare all that the package makes of a mini-batch with the oracle."""
    inputs = [pack(group, dtype=dtype) for group in micro_batches]
    loss, gradient, metrics, outputs = update(inputs, config)
    tokens = {
        name: on_response_tokens(inputs, [getattr(output, name) for output in outputs])
        for name in ("future_kl", "influence_weights", "kept_mask")
    }
    assert_same(
        oracle.mini_batch(micro_batches, config),
        loss=loss,
        gradient=gradient,
        metrics=metrics,
        relative=relative,
        absolute=absolute,
        **tokens,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_follows_its_rules_on_1000_random_mini_batches(preset: str) -> None:
    config = FipoConfig.preset(preset)
    for micro_batches in random_batches():
        assert_follows(micro_batches, config)


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_follow_the_rules(name: str) -> None:
    for micro_batches in random_batches()[:100]:
        assert_follows(micro_batches, OTHERS[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_follows_the_rules(preset: str) -> None:
    """Log-probabilities are multiples of 2⁻¹⁰, whose differences are exact, so that no decision is near."""
    for seed in range(100):
        batch = random_mini_batch(seed, grid=2**-10)
        assert_follows(batch, FipoConfig.preset(preset), relative=2e-6, absolute=1e-8, dtype=torch.float32)


def test_the_random_mini_batches_reach_every_rule() -> None:
    config = FipoConfig.preset("official-7b")
    batches = random_batches()[:300]
    rules = [[[oracle.response_terms(one, config) for one in group] for group in batch] for batch in batches]
    terms = [one for batch in rules for group in batch for one in group]
    responses = [one for batch in batches for group in batch for one in group]
    assert {1, 2, 3, 4} == {len(batch) for batch in batches}
    assert any(all(one.dropped for one in group) and len(batch) > 1 for batch in rules for group in batch)
    assert all({count} & {int(one.clipped.sum()) for one in terms} for count in (0, 1, 2, 3))
    assert any(len(one.positions) < one.positions[-1] + 1 for one in responses), "no gap in a response"
    assert {1, 2} < {len(one.positions) for one in responses}
    assert {-1.0, 0.0, 1.0} == {float(np.sign(one.advantages[0])) for one in responses}
    assert any(np.unique(np.sign(one.advantages)).size > 1 for one in responses)
    shifts = np.concatenate([one.log_probs - one.old_log_probs for one in responses])
    assert shifts.min() < -29 and shifts.max() > 29
    weights, ratio, negative = (
        np.concatenate([getattr(one, name) for one in terms]) for name in ("weights", "ratio", "advantages")
    )
    assert {0.8, 1.0, 1.2} < set(weights)
    unsafe = (negative < 0) & (ratio > config.safety_threshold)
    assert ((weights < 1) & unsafe).any() and ((weights == 1) & unsafe).any()


def test_the_oracle_agrees_with_the_rules_spelt_out() -> None:
    """F by its recursion in plain floats, and dℓ/d log π_θ by differences, with all weights held at 1."""
    config = FipoConfig.preset("official-7b", influence_clip_low=1.0, influence_clip_high=1.0)
    gamma = 2 ** (-1 / 32)
    for one in (one for batch in random_batches()[:20] for group in batch for one in group):
        terms = oracle.response_terms(one, config)
        following, place = 0.0, int(one.positions[-1])
        for t in reversed(range(len(one.positions))):
            stays = one.log_probs[t] - one.old_log_probs[t] <= math.log(10)
            following = terms.log_ratio[t] * stays + gamma ** (place - int(one.positions[t])) * following
            place = int(one.positions[t])
            assert terms.future_kl[t] == pytest.approx(following, rel=1e-10, abs=1e-10)

        step = 1e-6
        up, down = (
            oracle.response_terms(replace(one, log_probs=one.log_probs + sign * step), config).losses
            for sign in (1, -1)
        )
        smooth = np.abs(up - 2 * terms.losses + down) < 1e-8 * (1 + np.abs(terms.losses))
        assert smooth.mean() > 0.9 or len(smooth) < 10
        np.testing.assert_allclose(terms.slopes[smooth], ((up - down) / (2 * step))[smooth], rtol=1e-4, atol=1e-6)


def one_token(shift: float, advantage: float, config: FipoConfig) -> tuple[float, float, float, dict[str, float]]:
    """Loss, gradient, influence weight and metrics of a response of one token, checked against the oracle."""
    group = [response([shift], advantage)]
    assert_follows([group], config)
    loss, gradient, metrics, (output,) = update([pack(group)], config)
    return loss, float(gradient[0]), float(output.influence_weights[2]), metrics


UP, DOWN = math.inf, -math.inf


@pytest.mark.parametrize("preset", PRESETS)
def test_the_clamp_lets_the_gradient_through_up_to_its_ends(preset: str) -> None:
    config = FipoConfig.preset(preset, influence_clip_low=1.0)
    assert one_token(-20.0, 1.0, config)[:2] == (-math.exp(-20), -math.exp(-20))
    assert one_token(math.nextafter(-20.0, DOWN), 1.0, config)[:2] == (-math.exp(-20), 0.0)
    unbounded = replace(config, dual_clip=None, sequence_drop=False, participation_mask="none", safety_threshold=1.0)
    assert one_token(20.0, -1.0, unbounded)[:2] == pytest.approx((math.exp(20), math.exp(20)))
    assert one_token(math.nextafter(20.0, UP), -1.0, unbounded)[:2] == pytest.approx((math.exp(20), 0.0))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_ratio_at_a_clip_bound_is_not_clipped(preset: str) -> None:
    config = FipoConfig.preset(preset)
    _, gradient, weight, metrics = one_token(exact_log_ratio(1.28), 1.0, config)
    assert (gradient, metrics["train/clip_fraction_high"]) == (-weight * 1.28, 0.0)
    _, gradient, _, metrics = one_token(exact_log_ratio(1.28, beyond=UP), 1.0, config)
    assert (gradient, metrics["train/clip_fraction_high"]) == (0.0, 1.0)
    _, gradient, weight, metrics = one_token(exact_log_ratio(0.8), -1.0, config)
    assert (gradient, metrics["train/clip_fraction_low"]) == (weight * 0.8, 0.0)
    _, gradient, _, metrics = one_token(exact_log_ratio(0.8, beyond=DOWN), -1.0, config)
    assert (gradient, metrics["train/clip_fraction_low"]) == (0.0, 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_ratio_at_the_dual_clip_stays_in_the_sum_and_is_not_counted(preset: str) -> None:
    config = FipoConfig.preset(preset, dual_clip=2.0, sequence_drop=True, sequence_drop_max_clipped_tokens=0)
    at, above = exact_log_ratio(2.0), exact_log_ratio(2.0, beyond=UP)
    loss, gradient, weight, metrics = one_token(at, -1.0, config)
    assert metrics["fipo/future_kl_mean"] == at
    assert (metrics["fipo/dual_clip_fraction"], metrics["fipo/dropped_sequences"]) == (0.0, 0.0)
    assert loss == 2.0 * weight
    # Half of the gradient, as PyTorch's minimum shares it at a tie; so does the released code.
    assert gradient == weight
    _, gradient, _, metrics = one_token(above, -1.0, config)
    assert metrics["fipo/future_kl_mean"] == 0.0
    assert (metrics["fipo/dual_clip_fraction"], metrics["fipo/dropped_sequences"]) == (1.0, 1.0)
    assert gradient == 0.0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_ratio_at_the_safety_threshold_is_safe(preset: str) -> None:
    config = FipoConfig.preset(preset, safety_threshold=2.0)
    assert one_token(exact_log_ratio(2.0), -1.0, config)[2] == 1.2
    assert one_token(exact_log_ratio(2.0, beyond=UP), -1.0, config)[2] == 1.0
    assert one_token(exact_log_ratio(2.0, beyond=UP), 1.0, config)[2] == 1.2
    assert one_token(exact_log_ratio(2.0, beyond=UP), 0.0, config)[2] == 1.2


def test_a_future_kl_at_the_logarithm_of_a_bound() -> None:
    config = FipoConfig.preset("official-7b")
    _, _, weight, metrics = one_token(exact_log_ratio(1.2), 1.0, config)
    assert (weight, metrics["fipo/fraction_at_upper_bound"], metrics["fipo/fraction_at_lower_bound"]) == (1.2, 1.0, 0.0)
    _, _, weight, metrics = one_token(exact_log_ratio(0.8), 1.0, config)
    assert (weight, metrics["fipo/fraction_at_upper_bound"], metrics["fipo/fraction_at_lower_bound"]) == (0.8, 0.0, 1.0)
    one_sided = FipoConfig.preset("official-32b")
    _, _, weight, metrics = one_token(0.0, 1.0, one_sided)
    assert (weight, metrics["fipo/fraction_changed"], metrics["fipo/fraction_at_lower_bound"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("allowed", [0, 1, 2, 5])
def test_a_response_may_have_so_many_clipped_tokens_and_no_more(allowed: int) -> None:
    config = FipoConfig.preset("official-32b", sequence_drop_max_clipped_tokens=allowed)
    calm = response([0.1, -0.2], 1.0)
    at_most, one_more = (response([3.0] * count + [-0.1, 0.1], -1.0) for count in (allowed, allowed + 1))
    assert_follows([[at_most, calm], [one_more, calm]], config)
    *_, (first, second) = update([pack([at_most, calm]), pack([one_more, calm])], config)
    assert first.kept_mask.sum() == allowed + 4
    assert second.kept_mask.sum() == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_an_advantage_of_zero_teaches_nothing_and_drops_nothing(preset: str) -> None:
    group = [response([5.0, 25.0, -30.0, 4.0], 0.0)]
    assert_follows([group], FipoConfig.preset(preset))
    loss, gradient, metrics, (output,) = update([pack(group)], FipoConfig.preset(preset))
    assert loss == 0.0
    assert not gradient.any()
    assert output.kept_mask.sum() == 4
    assert (metrics["fipo/dropped_sequences"], metrics["fipo/dual_clip_fraction"]) == (0.0, 0.0)
    assert "fipo/step_size_ratio" not in metrics


DROPPED = response([3.0, 4.0, 0.1], -2.0)


@pytest.mark.parametrize("preset", ["official-32b", "official-7b"])
def test_nothing_is_left_of_a_mini_batch_whose_responses_are_all_dropped(preset: str) -> None:
    config = FipoConfig.preset(preset)
    assert_follows([[DROPPED, DROPPED], [DROPPED]], config)
    loss, gradient, metrics, outputs = update([pack([DROPPED, DROPPED]), pack([DROPPED])], config)
    assert loss == 0.0
    assert not gradient.any()
    assert not any(output.kept_mask.any() for output in outputs)
    assert metrics["fipo/dropped_sequences"] == 3.0
    assert "train/loss" not in metrics
    assert "fipo/step_size_ratio" not in metrics
    assert metrics["fipo/dual_clip_fraction"] == pytest.approx(2 / 3)


def test_an_all_dropped_micro_batch_adds_its_samples_and_nothing_else() -> None:
    """Its mean is 0 over no tokens, as in the released code; the mean over tokens does not see it."""
    config = FipoConfig.preset("official-32b")
    groups = [[DROPPED, DROPPED], [response([0.0], 3.0)]]
    assert_follows(groups, config)
    loss, gradient, metrics, outputs = update([pack(group) for group in groups], config)
    assert [int(output.denominator) for output in outputs] == [2, 1]
    assert loss == (2 * 0.0 + 1 * -3.0) / 3
    assert gradient.tolist() == [0.0] * 6 + [-1.0]
    assert metrics["train/loss"] == -3.0
    assert metrics["fipo/dropped_sequences"] == 2.0
    over_tokens = replace(config, aggregation="token_mean")
    assert_follows(groups, over_tokens)
    assert update([pack(group) for group in groups], over_tokens)[0] == -3.0


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "official_micro_batch"])
def test_responses_without_a_token_change_nothing(aggregation: str) -> None:
    """All masked, first, last, or a whole micro-batch."""
    config = FipoConfig.preset("official-7b", aggregation=aggregation)
    empty = response([], 1.0)
    groups = random_mini_batch(3)
    plain = update([pack(group) for group in groups], config)
    bare = [[replace(one, rollout_log_probs=None, entropy=None) for one in group] for group in groups]
    with_empty = update([pack([empty, *group, empty]) for group in bare] + [pack([empty, empty])], config)
    assert with_empty[0] == pytest.approx(plain[0], rel=1e-12)
    np.testing.assert_allclose(with_empty[1], plain[1], rtol=1e-12)
    assert with_empty[2] == pytest.approx({key: plain[2][key] for key in with_empty[2]}, rel=1e-12)


def test_a_response_without_a_token_is_no_sample_where_the_released_code_counts_it() -> None:
    config = FipoConfig.preset("official-32b")
    groups = [[response([0.0], 1.0)], [response([], 1.0), response([0.0], 3.0)]]
    assert update([pack(group) for group in groups], config)[0] == (1 * -1.0 + 1 * -3.0) / 2
    assert oracle.mini_batch(groups, config).loss == pytest.approx((1 * -1.0 + 2 * -3.0) / 3, abs=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_mini_batch_without_a_token_is_nothing(preset: str) -> None:
    empty = response([], 1.0)
    loss, gradient, metrics, outputs = update([pack([empty, empty])], FipoConfig.preset(preset))
    assert (loss, gradient.size, int(outputs[0].denominator)) == (0.0, 0, 0)
    assert set(metrics) == {
        "fipo/dropped_sequences",
        *(f"train/ratio_negative_count_{name}" for name in ("2_3", "3_4", "4_c")),
    }


@pytest.mark.parametrize(
    ("half_life", "expected"),
    [(math.inf, [1.5, 0.5, 1.0, 2.0]), (1.0, [0.75, -0.5, 0.0, 2.0]), (1e-9, [1.0, -0.5, -1.0, 2.0])],
    ids=["γ = 1", "γ = 1/2", "γ = 0"],
)
def test_the_ends_of_the_decay(half_life: float, expected: list[float]) -> None:
    group = [response([1.0, -0.5, -1.0, 2.0], 1.0)]
    config = FipoConfig.preset("official-7b", decay_half_life_tokens=half_life)
    assert_follows([group], config)
    inputs = pack(group)
    *_, (output,) = update([inputs], config)
    assert on_response_tokens([inputs], [output.future_kl]).tolist() == pytest.approx(expected, abs=1e-15)


def test_masked_tokens_count_as_distance() -> None:
    """Two tokens, eight positions apart: a half-life of 4 leaves a quarter."""
    group = [response([0.0, 2.0], 1.0, positions=np.array([0, 8]))]
    config = FipoConfig.preset("paper-v2", decay_half_life_tokens=4.0)
    assert_follows([group], config)
    inputs = pack(group)
    *_, (output,) = update([inputs], config)
    assert on_response_tokens([inputs], [output.future_kl]).tolist() == [0.5, 2.0]


def test_the_drop_counts_ratios_where_the_released_code_compares_losses() -> None:
    """A weight that has underflowed to 0 makes all losses 0, and none of them is above a bound."""
    config = FipoConfig.preset("official-7b", influence_clip_low=0.0, influence_clip_high=10.0, safety_threshold=1e8)
    config = replace(config, decay_half_life_tokens=math.inf)
    one = response([3.0, 3.0, *[-20.0] * 40], -1.0)
    assert oracle.response_terms(one, config).weights[0] == 0.0
    assert not oracle.response_terms(one, config).dropped
    assert update([pack([one])], config)[2]["fipo/dropped_sequences"] == 1.0


def test_at_the_dual_clip_itself_rounding_decides_in_the_released_code() -> None:
    """exp(log 10) is 10.000000000000002: kept in the sum by its logarithm, clipped by its exponential."""
    one = response([math.log(10.0)] * 2, -1.0)
    config = FipoConfig.preset("official-32b")
    terms = oracle.response_terms(one, config)
    assert terms.dropped and terms.future_kl.all()
    *_, metrics, (output,) = update([pack([one])], config)
    assert output.future_kl[2:4].all()
    assert metrics["fipo/dropped_sequences"] == 0.0


def test_no_epsilon_is_added_to_a_denominator() -> None:
    group = [response([0.0], 1.0)]
    config = FipoConfig.preset("official-32b")
    assert update([pack(group)], config)[0] == -1.0
    assert oracle.mini_batch([group], config).loss == pytest.approx(-1.0 + 1e-8, abs=1e-12)
