"""FIPO's limits and its controls: what is left when a rule is turned off, and what each control changes."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fipo.algorithms.future_kl import reference
from megatron_fipo.algorithms.influence_controls import VARIANCE_FLOOR, shuffle_within_responses, variance_decay
from megatron_fipo.algorithms.losses import PolicyLoss
from megatron_fipo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.baselines import DapoConfig
from megatron_fipo.parallel.layout import PackLayout
from tests.unit.algorithms.baseline_formulas import Rows, loss_and_gradient, rows

CONTROLS: dict[str, dict[str, Any]] = {
    "shuffled": {"influence": "shuffled"},
    "constant": {"influence": "constant"},
    "exclusive": {"include_current_token": False},
    "self-normalised": {"self_normalize": True},
    "variance": {"decay": "variance"},
    "all together": {
        "influence": "shuffled",
        "include_current_token": False,
        "self_normalize": True,
        "decay": "variance",
    },
}


def fipo(**values: Any) -> FipoConfig:
    """FIPO with wide bounds, without the sequence drop."""
    return FipoConfig(**{"influence_clip_low": 0.5, "influence_clip_high": 2.0, "sequence_drop": False, **values})


def assert_same(first: tuple[PolicyLoss, Tensor], second: tuple[PolicyLoss, Tensor]) -> None:
    """Loss and gradient are equal bit for bit."""
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1])
    assert second[1].any()


def log_ratios(batch: Rows) -> Tensor:
    return torch.where(batch["response_mask"], batch["log_probs"] - batch["old_log_probs"], 0.0).detach()


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_every_control_is_dapo_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    batch = rows(seed=0, spread=0.0, dtype=dtype)
    assert_same(loss_and_gradient(batch, FipoConfig(**CONTROLS[name])), loss_and_gradient(batch, DapoConfig()))


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_but_a_constant_of_one_differs_from_fipo_off_policy(name: str) -> None:
    batch = rows(seed=0, spread=0.3)
    plain, _ = loss_and_gradient(batch, fipo())
    assert not torch.equal(plain.loss, loss_and_gradient(batch, fipo(**CONTROLS[name]))[0].loss)


@pytest.mark.parametrize(
    "values",
    [
        {"influence": "constant"},
        {"influence_clip_low": 1.0, "influence_clip_high": 1.0},
        {"influence_clip_low": 1.0, "influence_clip_high": 1.0, "safety_mode": "reset", "safety_threshold": 1.5},
        {"influence_clip_low": 1.0, "influence_clip_high": 1.0, "self_normalize": True, "influence": "shuffled"},
    ],
)
@given(seed=st.integers(0, 999), spread=st.sampled_from([0.05, 0.5, 2.0]))
@settings(max_examples=10)
def test_a_weight_of_one_is_dapo_bit_for_bit(values: dict[str, Any], seed: int, spread: float) -> None:
    batch = rows(seed, spread)
    assert_same(loss_and_gradient(batch, fipo(**values)), loss_and_gradient(batch, DapoConfig()))


@given(seed=st.integers(0, 999), spread=st.sampled_from([0.05, 0.5, 2.0]), constant=st.floats(0.2, 5.0))
@settings(max_examples=20)
def test_a_constant_weight_scales_the_step_and_self_normalisation_undoes_it(
    seed: int, spread: float, constant: float
) -> None:
    batch = rows(seed, spread)
    dapo, wanted = loss_and_gradient(batch, DapoConfig())
    scaled, gradient = loss_and_gradient(batch, fipo(influence="constant", constant_influence=constant))
    torch.testing.assert_close(scaled.loss, constant * dapo.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, constant * wanted, rtol=1e-12, atol=1e-14)
    assert scaled.metrics.get("fipo/step_size_ratio", constant) == pytest.approx(constant)
    config = fipo(influence="constant", constant_influence=constant, self_normalize=True)
    normalised, gradient = loss_and_gradient(batch, config)
    torch.testing.assert_close(normalised.loss, dapo.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_constant_weights_still_report_the_future_kl_and_drop_sequences() -> None:
    batch = rows(seed=1, spread=3.0)
    constant, _ = loss_and_gradient(batch, FipoConfig(influence="constant", dual_clip=2.0))
    plain, _ = loss_and_gradient(batch, FipoConfig(dual_clip=2.0))
    assert torch.equal(constant.future_kl, plain.future_kl)
    assert constant.metrics["fipo/dropped_sequences"] == plain.metrics["fipo/dropped_sequences"] > 0
    assert (constant.influence_weights == 1).all() and not (plain.influence_weights == 1).all()


def test_a_half_life_near_zero_leaves_a_tokens_own_term_and_an_infinite_one_the_whole_sum() -> None:
    batch = rows(seed=2, spread=0.3)
    own = log_ratios(batch)
    short, _ = loss_and_gradient(batch, fipo(decay_half_life_tokens=1e-4))
    assert torch.equal(short.future_kl, own)
    behind = own.flip(1).cumsum(dim=1).flip(1)
    long, _ = loss_and_gradient(batch, fipo(decay_half_life_tokens=math.inf))
    torch.testing.assert_close(long.future_kl, behind, rtol=1e-13, atol=1e-14)
    alone, _ = loss_and_gradient(batch, fipo(decay_half_life_tokens=1e-4, include_current_token=False))
    assert not alone.future_kl.any() and (alone.influence_weights == 1).all()


def test_a_huge_dual_clip_is_none() -> None:
    batch = rows(seed=3, spread=2.0)
    none = fipo(dual_clip=None, participation_mask="none")
    for mask in ("all_tokens", "negative_advantage", "none"):
        huge = fipo(dual_clip=1e8, participation_mask=mask)
        assert_same(loss_and_gradient(batch, huge), loss_and_gradient(batch, none))
    assert not torch.equal(
        loss_and_gradient(batch, fipo(dual_clip=1.5))[0].loss, loss_and_gradient(batch, none)[0].loss
    )


@given(seed=st.integers(0, 999), half_life=st.sampled_from([0.5, 4.0, 32.0, math.inf]))
@settings(max_examples=20)
def test_the_exclusive_sum_starts_behind_the_token(seed: int, half_life: float) -> None:
    batch = rows(seed, spread=0.3)
    result, _ = loss_and_gradient(batch, fipo(include_current_token=False, decay_half_life_tokens=half_life))
    whole = reference.future_kl(log_ratios(batch), half_life)
    behind = torch.nn.functional.pad(whole[:, 1:], (0, 1)) * 2.0 ** (-1 / half_life)
    mask = batch["response_mask"]
    torch.testing.assert_close(result.future_kl[mask], behind[mask], rtol=1e-12, atol=1e-14)
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    assert last.any() and (result.influence_weights[last] == 1).all()


def test_a_filtered_token_keeps_its_exclusive_sum() -> None:
    """Its own term is not in the sum, so there is nothing to take out."""
    shift = torch.tensor([[math.log(50.0), 0.25]], dtype=torch.float64)
    batch = {
        "log_probs": shift.requires_grad_(),
        "old_log_probs": torch.zeros_like(shift),
        "advantages": torch.ones_like(shift),
        "response_mask": torch.ones_like(shift, dtype=torch.bool),
    }
    result, _ = loss_and_gradient(batch, fipo(include_current_token=False, decay_half_life_tokens=1.0))
    assert result.future_kl.tolist() == [[0.125, 0.0]]


@given(seed=st.integers(0, 999), spread=st.sampled_from([0.05, 0.5, 2.0]))
@settings(max_examples=20)
def test_self_normalisation_divides_by_the_weights_that_are_kept(seed: int, spread: float) -> None:
    batch = rows(seed, spread)
    config = fipo(sequence_drop=True, dual_clip=1.5)
    plain, gradient = loss_and_gradient(batch, config)
    ours, scaled = loss_and_gradient(batch, dataclasses.replace(config, self_normalize=True))
    kept = plain.loss_mask
    factor = int(kept.sum()) / max(float(plain.influence_weights[kept].sum()), 1e-300)
    torch.testing.assert_close(ours.loss, plain.loss * factor, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(scaled, gradient * factor, rtol=1e-12, atol=1e-14)
    assert ours.metrics == pytest.approx(plain.metrics)


def test_self_normalisation_with_every_sequence_dropped_is_zero() -> None:
    batch = rows(seed=0, spread=0.0)
    batch["log_probs"] = (batch["old_log_probs"] + 5.0).requires_grad_()
    batch["advantages"] = batch["advantages"] * 0 - 1.0
    result, gradient = loss_and_gradient(batch, FipoConfig(self_normalize=True, sequence_drop_max_clipped_tokens=0))
    assert float(result.loss.detach()) == 0.0 and not gradient.any() and not result.loss_mask.any()


@dataclasses.dataclass(kw_only=True)
class Sequence:
    """One sequence of a pack: weights (or log-ratios), response mask and number."""

    values: np.ndarray
    mask: np.ndarray
    number: int


def sequences(seed: int, count: int = 6, longest: int = 60) -> list[Sequence]:
    draws = np.random.default_rng(seed)
    lengths = draws.integers(1, longest, count)
    result = []
    for number, length in enumerate(lengths):
        mask = np.arange(length) >= draws.integers(0, length)
        mask &= draws.random(length) < 0.9
        values = draws.standard_normal(length) * draws.choice([0.01, 0.3, 1.0])
        result.append(Sequence(values=values, mask=mask, number=100 + number))
    return result


def shuffled(pack: list[Sequence]) -> list[np.ndarray]:
    layout = PackLayout(tuple(len(one.values) for one in pack))
    result = shuffle_within_responses(
        torch.from_numpy(np.concatenate([one.values for one in pack])),
        torch.from_numpy(np.concatenate([one.mask for one in pack])),
        torch.tensor([one.number for one in pack]),
        layout,
        None,
    )
    return [part.numpy() for part in result.split(layout.padded_lengths)]


def splitmix(number: int, position: int) -> int:
    """The key of a token, with whole numbers that do not wrap by themselves; as a signed number."""
    wrap = (1 << 64) - 1
    mixed = (number * 0x9E3779B97F4A7C15 + position * 0x632BE59BD9B4E019) & wrap
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & wrap
    mixed ^= mixed >> 31
    return mixed - (1 << 64) if mixed >> 63 else mixed


@given(seed=st.integers(0, 999), data=st.data())
@settings(max_examples=25)
def test_a_shuffle_deals_each_responses_weights_whatever_the_packing(seed: int, data: st.DataObject) -> None:
    pack = sequences(seed)
    results = shuffled(pack)
    for one, dealt in zip(pack, results, strict=True):
        places = one.mask.nonzero()[0]
        order = sorted(places, key=lambda place, number=one.number: splitmix(number, int(place)))
        wanted = one.values.copy()
        wanted[order] = one.values[places]
        assert np.array_equal(dealt, wanted)
        assert sorted(dealt[one.mask]) == sorted(one.values[one.mask])
        assert np.array_equal(dealt[~one.mask], one.values[~one.mask])
    order = data.draw(st.permutations(range(len(pack))))
    cut = data.draw(st.integers(0, len(pack)))
    for part in filter(None, (order[:cut], order[cut:])):
        for index, dealt in zip(part, shuffled([pack[index] for index in part]), strict=True):
            assert np.array_equal(dealt, results[index])


def test_padding_behind_a_response_does_not_change_its_shuffle() -> None:
    one = sequences(seed=3, count=1)[0]
    padded = Sequence(
        values=np.append(one.values, [7.0, 7.0, 7.0]), mask=np.append(one.mask, [False] * 3), number=one.number
    )
    assert np.array_equal(shuffled([padded])[0], np.append(shuffled([one])[0], [7.0, 7.0, 7.0]))


def test_a_shuffle_forgets_where_weights_were() -> None:
    """Ranks dealt out and ranks before are uncorrelated, responses unlike each other, few tokens stay in place."""
    length = 4000
    pack = [Sequence(values=np.arange(length, dtype=float), mask=np.ones(length, bool), number=n) for n in range(4)]
    results = [*shuffled(pack), np.arange(length, dtype=float)]
    correlations = np.corrcoef(results) - np.eye(len(results))
    assert np.abs(correlations).max() < 4 / math.sqrt(length)
    steps = [np.corrcoef(dealt[:-1], dealt[1:])[0, 1] for dealt in results[:-1]]
    assert np.abs(steps).max() < 4 / math.sqrt(length)
    assert max(int((dealt == results[-1]).sum()) for dealt in results[:-1]) < 10


def test_a_response_of_one_token_keeps_its_weight_and_the_step_keeps_its_size() -> None:
    batch = rows(seed=5, spread=0.3, count=6, length=1)
    assert_same(loss_and_gradient(batch, fipo(influence="shuffled")), loss_and_gradient(batch, fipo()))
    batch = rows(seed=5, spread=0.3)
    ours, plain = (loss_and_gradient(batch, fipo(influence=name))[0].metrics for name in ("shuffled", "future_kl"))
    same = [key for key in plain if key.startswith("fipo/")]
    assert {key: ours[key] for key in same} == pytest.approx({key: plain[key] for key in same}, rel=1e-12)
    assert ours["train/loss"] != plain["train/loss"]


def test_a_shuffle_needs_the_numbers_of_the_sequences() -> None:
    inputs = LossInputs(
        log_probs=torch.zeros(2),
        old_log_probs=torch.zeros(2),
        advantages=torch.ones(2),
        response_mask=torch.ones(2, dtype=torch.bool),
        response_lengths=torch.tensor([2]),
        layout=PackLayout((2,)),
    )
    with pytest.raises(ValueError, match="sequence_numbers = None: influence = shuffled needs them"):
        policy_loss(inputs, FipoConfig(influence="shuffled"))


def decays(pack: list[Sequence], config: FipoConfig, participates: list[np.ndarray] | None = None) -> list[np.ndarray]:
    layout = PackLayout(tuple(len(one.values) for one in pack))
    mask = np.concatenate([one.mask for one in pack])
    taking_part = mask if participates is None else mask & np.concatenate(participates)
    values = np.where(taking_part, np.concatenate([one.values for one in pack]), 0.0)
    result = variance_decay(*(torch.from_numpy(each) for each in (values, taking_part, mask)), config, layout, None)
    return [part.numpy() for part in result.split(layout.padded_lengths)]


def published_decay(one: Sequence, participates: np.ndarray, config: FipoConfig) -> np.ndarray:
    """FIPO-K's γ_t, window by window; the median is the response's own."""
    gamma = 2 ** (-1 / config.decay_half_life_tokens)
    taking_part = one.mask & participates
    variances = []
    for token in range(len(one.values)):
        ahead = slice(token + 1, token + 1 + config.variance_window_tokens)
        window = one.values[ahead][taking_part[ahead]]
        window = window if len(window) >= 2 else one.values[taking_part]
        variances.append((np.var(window) if len(window) else 0.0) + VARIANCE_FLOOR)
    result = np.full(len(variances), gamma)
    of_response = np.sort(np.array(variances)[one.mask])
    if len(of_response) and (median := of_response[(len(of_response) - 1) // 2]) > 2 * VARIANCE_FLOOR:
        pull = gamma * median / (1 - gamma)
        bounded = np.clip(pull / (pull + variances), config.variance_decay_low, config.variance_decay_high)
        result[one.mask] = bounded[one.mask]
    return result


@given(
    seed=st.integers(0, 999),
    window=st.sampled_from([2, 5, 64, 2**63 - 1, 10**30]),
    half_life=st.sampled_from([1.0, 32.0, 256.0]),
)
@settings(max_examples=40)
def test_variance_decay_is_the_published_one_with_the_responses_own_median(
    seed: int, window: int, half_life: float
) -> None:
    config = fipo(decay="variance", variance_window_tokens=window, decay_half_life_tokens=half_life)
    pack = sequences(seed)
    draws = np.random.default_rng(seed)
    participates = [draws.random(len(one.values)) < 0.9 for one in pack]
    found = decays(pack, config, participates)
    for one, chosen, values in zip(pack, participates, found, strict=True):
        assert values == pytest.approx(published_decay(one, chosen, config), rel=1e-9)
        assert (values[one.mask] <= 0.9995).all() and (values >= 0.5).all()


def test_variance_decay_is_gamma_at_the_median_and_reaches_further_where_it_is_calm() -> None:
    """Over 99 tokens the log-ratios swing wider and wider, so that the decay falls."""
    growing = np.array([(-1.0) ** k * 1.05**k for k in range(99)])
    one = Sequence(values=growing, mask=np.ones(99, bool), number=0)
    (values,) = decays([one], fipo(decay="variance", variance_window_tokens=4))
    inside = values[:94]
    assert (np.diff(inside) <= 0).all() and inside[0] > inside[-1]
    assert np.isclose(values, 2 ** (-1 / 32), rtol=1e-12).any()


@pytest.mark.parametrize("shift", [0.0, 0.1, -3.0])
def test_without_variance_the_decay_is_constant(shift: float) -> None:
    """To rounding where every log-ratio is the same, bit for bit where they are zero."""
    batch = rows(seed=6, spread=0.0)
    batch["log_probs"] = (batch["old_log_probs"] + shift).requires_grad_()
    plain, gradient = loss_and_gradient(batch, fipo())
    ours, same = loss_and_gradient(batch, fipo(decay="variance"))
    tolerance = {"rtol": 0.0 if shift == 0 else 1e-13, "atol": 0.0}
    torch.testing.assert_close(ours.future_kl, plain.future_kl, **tolerance)
    torch.testing.assert_close(same, gradient, **tolerance)


def test_a_response_that_has_mostly_not_moved_keeps_gamma_whatever_rounding_does() -> None:
    """Windows of equal log-ratios have a variance of rounding alone; more than half of all are such."""
    values = np.zeros(700)
    values[500:] = np.random.default_rng(0).standard_normal(200)
    one = Sequence(values=values, mask=np.ones(700, bool), number=0)
    for still in (0.0, 0.1):
        one.values[:500] = still
        assert (decays([one], fipo(decay="variance"))[0] == 2 ** (-1 / 32)).all()
    one.values[:500] = 0.1 * values[500:].repeat(3)[:500]
    assert (decays([one], fipo(decay="variance"))[0] == 2 ** (-1 / 32)).mean() < 0.01


@given(seed=st.integers(0, 999))
@settings(max_examples=15)
def test_variance_decay_enters_the_future_kl_token_by_token(seed: int) -> None:
    batch = rows(seed, spread=0.3, length=90)
    config = fipo(decay="variance", variance_window_tokens=8)
    result, _ = loss_and_gradient(batch, config)
    values, mask = log_ratios(batch), batch["response_mask"]
    pack = [
        Sequence(values=row.numpy(), mask=chosen.numpy(), number=0) for row, chosen in zip(values, mask, strict=True)
    ]
    wanted = [published_decay(one, one.mask, config) for one in pack]
    summed = reference.future_kl(values, 32.0, decay=torch.from_numpy(np.stack(wanted)))
    torch.testing.assert_close(result.future_kl[mask], summed[mask], rtol=1e-9, atol=1e-10)


def test_variance_decay_does_not_see_the_other_sequences_of_a_pack() -> None:
    """A neighbour whose log-ratios are 20,000 times as large, before or behind, changes nothing but rounding."""
    draws = np.random.default_rng(0)
    calm = Sequence(values=1e-3 * draws.standard_normal(300), mask=np.ones(300, bool), number=0)
    wild = Sequence(values=20.0 * draws.choice([-1.0, 1.0], 20_000), mask=np.ones(20_000, bool), number=1)
    config = fipo(decay="variance")
    alone = decays([calm], config)[0]
    assert decays([wild, calm], config)[1] == pytest.approx(alone, rel=1e-12)
    assert decays([calm, wild], config)[0] == pytest.approx(alone, rel=1e-12)
    assert alone.max() - alone.min() > 1e-3


def test_sequences_without_tokens_or_responses_are_skipped() -> None:
    empty = Sequence(values=np.zeros(0), mask=np.zeros(0, bool), number=5)
    silent = Sequence(values=np.ones(3), mask=np.zeros(3, bool), number=6)
    some = sequences(seed=1, count=2)
    config = fipo(decay="variance")
    pack = [some[0], empty, silent, some[1], empty]
    for function in (shuffled, lambda part: decays(part, config)):
        results = function(pack)
        assert len(results[1]) == len(results[4]) == 0
        for index in (0, 3):
            assert results[index] == pytest.approx(function([pack[index]])[0], rel=1e-12)
    assert np.array_equal(shuffled(pack)[2], silent.values)
    assert (decays(pack, config)[2] == 2 ** (-1 / 32)).all()
