"""Avg@k, Cons@k, Pass@k and the interval, against hand computations, enumeration and simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.metrics.estimators import consensus_at_k, mean_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 2, 1, 1 / 2),
        # 1 - C(2, 2) / C(4, 2) = 1 - 1/6
        (4, 2, 2, 5 / 6),
        # Two wrong ones cannot fill three places.
        (4, 2, 3, 1.0),
        # 1 - C(31, 8) / C(32, 8) = 8/32
        (32, 1, 8, 1 / 4),
        (32, 0, 32, 0.0),
        (32, 32, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k([n], [c], k).tolist() == [pytest.approx(expected, abs=1e-15)]


@given(st.data())
def test_pass_at_k_is_the_quotient_of_binomials(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 2000))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k([n], [c], k)[0] == pytest.approx(float(exact), abs=1e-12)


@given(st.integers(1, 40), st.data())
def test_pass_at_k_grows_with_k_from_avg_to_any(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    values = [pass_at_k([n], [c], k)[0] for k in range(1, n + 1)]
    assert values[0] == pytest.approx(c / n, abs=1e-14)
    assert values[-1] == float(c > 0)
    assert all(later >= earlier - 1e-14 for earlier, later in itertools.pairwise(values))


def test_pass_at_k_takes_problems_with_different_numbers_of_samples() -> None:
    # 1 - C(3, 2) / C(4, 2) = 1/2;  1 - C(1, 2) / C(2, 2) = 1.
    assert pass_at_k([4, 2], [1, 1], 2).tolist() == [pytest.approx(0.5), 1.0]


@pytest.mark.parametrize("k", [0, 3])
def test_more_samples_than_there_are_is_refused(k: int) -> None:
    message = rf"k = {k}: must lie in \[1, 2\], the samples of a problem"
    with pytest.raises(ValueError, match=message):
        pass_at_k([2, 4], [0, 4], k)
    with pytest.raises(ValueError, match=message):
        consensus_at_k([2], [True], 2, k)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_correct"):
        pass_at_k([4], [5], 1)
    with pytest.raises(ValueError, match="class_sizes = "):
        consensus_at_k([3, 2], [True, False], 4, 4)
    with pytest.raises(ValueError, match="class_sizes = "):
        consensus_at_k([3], [True, False], 4, 4)


@pytest.mark.parametrize(
    ("sizes", "correct", "n", "k", "expected"),
    [
        ([3, 1], [True, False], 4, 4, 1.0),
        ([3, 1], [False, True], 4, 4, 0.0),
        # A tie of two, of which one is right; and of three.
        ([2, 2], [True, False], 4, 4, 1 / 2),
        ([1, 1, 1], [True, False, False], 4, 4, 1 / 3),
        # One vote decides, however many are silent; without any vote the consensus is wrong.
        ([1], [True], 4, 4, 1.0),
        ([], [], 4, 4, 0.0),
        # Samples R R W -, two of them: RR -> 1; RW four times? No: pairs are RR, RW, RW, R-, R-, W- -> (1 + 1/2 + 1/2 +
        # 1 + 1 + 0) / 6.
        ([2, 1], [True, False], 4, 2, 4 / 6),
        # Two of which may both be right, yet different: they vote apart.
        ([2, 1], [True, True], 3, 3, 1.0),
    ],
)
def test_consensus_by_hand(sizes: list[int], correct: list[bool], n: int, k: int, expected: float) -> None:
    assert consensus_at_k(sizes, correct, n, k) == pytest.approx(expected, abs=1e-14)


def enumerated_consensus(sizes: list[int], correct: list[bool], n: int, k: int) -> float:
    """Mean over all choices of k samples."""
    answers = [answer for answer, size in enumerate(sizes) for _ in range(size)] + [-1] * (n - sum(sizes))
    values = []
    for chosen in itertools.combinations(answers, k):
        votes = {answer: chosen.count(answer) for answer in chosen if answer >= 0}
        tied = [correct[answer] for answer, count in votes.items() if count == max(votes.values())]
        values.append(sum(tied) / len(tied) if tied else 0.0)
    return sum(values) / len(values)


@given(st.data())
def test_consensus_is_the_mean_over_all_choices(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=4))
    correct = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    n = max(1, sum(sizes) + data.draw(st.integers(0, 2)))
    n = min(n, 10) if sum(sizes) <= 10 else sum(sizes)
    k = data.draw(st.integers(1, min(n, 6)))
    assert consensus_at_k(sizes, correct, n, k) == pytest.approx(enumerated_consensus(sizes, correct, n, k), abs=1e-12)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.data())
def test_one_sample_agrees_with_itself(sizes: list[int], data: st.DataObject) -> None:
    """Cons@1 is Avg@1, whatever the number of samples."""
    correct = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    n = sum(sizes) + data.draw(st.integers(0, 900))
    average = sum(size for size, right in zip(sizes, correct, strict=True) if right) / n
    assert consensus_at_k(sizes, correct, n, 1) == pytest.approx(average, abs=1e-11)


def test_all_estimators_agree_where_every_sample_is_right_or_wrong() -> None:
    for k in (1, 7, 32):
        assert consensus_at_k([32], [True], 32, k) == pytest.approx(1.0, abs=1e-12)
        assert consensus_at_k([32], [False], 32, k) == 0.0
        assert pass_at_k([32, 32], [32, 0], k).tolist() == [1.0, 0.0]


# The interval.


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.integers(0, 3))
def test_interval_lies_around_the_mean_in_the_unit_interval(counts: list[int], seed: int) -> None:
    values = np.array(counts) / 8
    for samples in (None, 8):
        low, high = mean_interval(values, confidence=0.95, seed=seed, samples_per_problem=samples, num_resamples=200)
        assert 0 <= low <= values.mean() + 1e-9
        assert values.mean() - 1e-9 <= high <= 1


def test_interval_is_repeatable_and_depends_on_the_values_alone() -> None:
    values = np.random.default_rng(0).integers(0, 9, 50) / 8
    first = mean_interval(values, confidence=0.95, seed=3)
    assert mean_interval(values[::-1], confidence=0.95, seed=3) == first
    assert mean_interval(values, confidence=0.95, seed=4) != first
    assert mean_interval(values, confidence=0.95, seed=4) == pytest.approx(first, abs=0.02 * (first[1] - first[0]))


def test_interval_is_wider_at_higher_confidence_and_with_resampled_samples() -> None:
    values = np.random.default_rng(0).integers(1, 8, 50) / 8
    widths = [
        high - low
        for low, high in (
            mean_interval(values, confidence=0.8, seed=0),
            mean_interval(values, confidence=0.95, seed=0),
            mean_interval(values, confidence=0.95, seed=0, samples_per_problem=8),
        )
    ]
    assert widths[0] < 0.9 * widths[1]
    assert widths[1] < 0.9 * widths[2]


def test_values_of_0_and_1_and_values_without_spread_get_wilsons_interval() -> None:
    assert mean_interval([0, 0, 1], confidence=0.9, seed=0) == wilson_interval(1, 3, 0.9)
    assert mean_interval([0.25] * 4, confidence=0.95, seed=0) == wilson_interval(1, 4)


@pytest.mark.parametrize("values", [[], [1.5], [math.nan], [[0.5]]])
def test_values_without_an_interval_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        mean_interval(values, confidence=0.95, seed=0)


COVERAGE = {
    # Share of problems that the model always, sometimes or never solves: chances are drawn from Beta(a, b).
    "mostly solved or not, mean 0.5": (0.3, 0.3),
    "mostly not solved, mean 0.2": (0.3, 1.2),
    "even chances, mean 0.5": (2.0, 2.0),
}


@pytest.mark.parametrize("num_problems", [30, 200])
@pytest.mark.parametrize("kind", COVERAGE)
def test_interval_of_avg_at_32_covers_the_mean_as_often_as_it_says(kind: str, num_problems: int) -> None:
    """Fixed seeds. 5,000 repeats with 2,000 resamples gave, in this order, 0.962, 0.959, 0.954 at 30 problems."""
    a, b = COVERAGE[kind]
    rng = np.random.default_rng(11)
    hits, repeats = 0, 400
    for repeat in range(repeats):
        values = rng.binomial(32, rng.beta(a, b, num_problems)) / 32
        low, high = mean_interval(values, confidence=0.95, seed=repeat, num_resamples=300)
        hits += low <= a / (a + b) <= high
    assert 0.92 <= hits / repeats <= 0.98


@pytest.mark.parametrize("num_problems", [30, 200])
@pytest.mark.parametrize("rate", [0.03, 0.2, 0.83])
def test_interval_of_a_rate_covers_it_as_often_as_it_says(rate: float, num_problems: int) -> None:
    """Computed, not drawn: every number of successes with its chance."""
    covered = 0.0
    for count in range(num_problems + 1):
        low, high = mean_interval([1.0] * count + [0.0] * (num_problems - count), confidence=0.95, seed=0)
        chance = math.comb(num_problems, count) * rate**count * (1 - rate) ** (num_problems - count)
        covered += chance * (low <= rate <= high)
    assert 0.92 <= covered <= 0.98


# Wilson's interval.

# z = 1.959963984540054. The first two are Newcombe's (1998, Statist. Med. 17, Table I, method 3), to 4 digits;
# at 0 successes the interval is (0, z² / (n + z²)).
KNOWN = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (29, 29, 0.8830, 1.0),
    (0, 10, 0.0, 0.27753280),
    (5, 10, 0.23659309, 0.76340691),
    (10, 10, 0.72246720, 1.0),
]


@pytest.mark.parametrize(("successes", "trials", "low", "high"), KNOWN)
def test_interval_has_the_published_limits(successes: int, trials: int, low: float, high: float) -> None:
    digits = 5e-5 if trials != 10 else 5e-9
    assert wilson_interval(successes, trials) == (pytest.approx(low, abs=digits), pytest.approx(high, abs=digits))


@pytest.mark.parametrize("trials", [1, 7, 512])
def test_interval_lies_in_the_unit_interval_around_the_rate(trials: int) -> None:
    for successes in {0, 1, trials // 2, trials}:
        low, high = wilson_interval(successes, trials)
        mirrored = wilson_interval(trials - successes, trials)
        assert 0 <= low <= successes / trials + 1e-12
        assert successes / trials - 1e-12 <= high <= 1
        assert (1 - mirrored[1], 1 - mirrored[0]) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_interval_narrows_with_the_root_of_the_trials() -> None:
    width = {trials: 2 * (0.5 - wilson_interval(trials / 2, trials)[0]) for trials in (400, 1600)}
    assert width[400] / width[1600] == pytest.approx(2, rel=0.01)
