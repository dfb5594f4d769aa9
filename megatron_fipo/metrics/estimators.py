"""Avg@k, Cons@k and Pass@k of sampled answers, and intervals of their means over problems. NumPy alone.

Every estimator is, for one problem of which n samples were taken, the expected value of the quantity over a random
choice of k of them without replacement: exact, without drawing. Avg@k is the share of correct samples, whatever k is.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def pass_at_k(num_samples: npt.ArrayLike, num_correct: npt.ArrayLike, k: int) -> Array:
    """Chance that at least one of k samples is correct: 1 − C(n − c, k) / C(n, k) (Chen et al., arXiv:2107.03374).

    The quotient is a product of k factors in [0, 1], so nothing overflows or cancels.

    Args:
        num_samples: [N] int, n of every problem.
        num_correct: [N] int, c of every problem.
        k: Samples chosen.

    Returns:
        [N] float64.

    Raises:
        ValueError: k or a count of correct samples is not possible for its n.
    """
    n, c = np.asarray(num_samples, dtype=np.int64), np.asarray(num_correct, dtype=np.int64)
    if n.size:
        _check_k(k, int(n.min()))
    if np.any((c < 0) | (c > n)):
        raise ValueError("num_correct: must lie between 0 and num_samples")
    all_wrong = np.ones(n.shape)
    for chosen in range(k):
        all_wrong *= np.maximum(n - c - chosen, 0) / (n - chosen)
    return 1.0 - all_wrong


def consensus_at_k(class_sizes: Sequence[int], class_correct: Sequence[bool], num_samples: int, k: int) -> float:
    """Chance that the most frequent answer of k samples is correct, ties being broken evenly.

    The samples of a class gave equal answers. Samples in no class gave none: they are chosen like others but do not
    vote. Where nobody votes the consensus is wrong.

    With k < n, class j gets X_j of the chosen samples, and (X_j) is multivariate hypergeometric: that is, independent
    binomial counts of one success rate, given that they add up to k. For every top count m the distribution of
    (samples chosen, classes tied at m) is built class by class. Time grows as classes · k³.

    Args:
        class_sizes: Samples of each class of equal answers.
        class_correct: Whether the class's answer is correct.
        num_samples: n, samples without an answer included.
        k: Samples chosen.

    Raises:
        ValueError: k is not possible for n, or the classes hold more samples than there are.
    """
    _check_k(k, num_samples)
    num_silent = num_samples - sum(class_sizes)
    if num_silent < 0 or len(class_sizes) != len(class_correct):
        raise ValueError(
            f"class_sizes = {list(class_sizes)}: must be as many as class_correct, and add up to at most n"
        )
    if not class_sizes:
        return 0.0
    if k == num_samples:
        top = max(class_sizes)
        tied = [correct for size, correct in zip(class_sizes, class_correct, strict=True) if size == top]
        return sum(tied) / len(tied)
    rate = k / num_samples
    counts = [_binomial(size, rate, k) for size in class_sizes]
    silent = _binomial(num_silent, rate, k)
    total = sum(
        _correct_at_top(counts, class_correct, silent, top, k) for top in range(1, min(k, max(class_sizes)) + 1)
    )
    return min(1.0, total / float(_binomial(num_samples, rate, k)[k]))


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}: must lie in [1, {num_samples}], the samples of a problem")


def _binomial(n: int, rate: float, longest: int) -> Array:
    """[min(n, longest) + 1] float64, the chances of 0, 1, ... successes in n trials."""
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(x + 1)
        - math.lgamma(n - x + 1)
        + x * math.log(rate)
        + (n - x) * math.log1p(-rate)
        for x in range(min(n, longest) + 1)
    ]
    return np.exp(logs)


def _correct_at_top(counts: Sequence[Array], correct: Sequence[bool], silent: Array, top: int, k: int) -> float:
    """Chance that k samples are chosen, the largest class has `top` of them, and a fair choice of such is correct.

    Rows of both arrays are the classes tied so far, columns the samples chosen so far. `chance` holds chances, and
    `tied_correct` the same times the expected number of correct classes among the tied ones.
    """
    chance = np.zeros((k // top + 1, k + 1))
    chance[0, : len(silent)] = silent
    tied_correct = np.zeros_like(chance)
    for pmf, is_correct in zip(counts, correct, strict=True):
        new_chance, new_tied_correct = np.zeros_like(chance), np.zeros_like(chance)
        for size, share in enumerate(pmf[:top]):
            new_chance[:, size:] += share * chance[:, : k + 1 - size]
            new_tied_correct[:, size:] += share * tied_correct[:, : k + 1 - size]
        if len(pmf) > top:
            before = chance[:-1, : k + 1 - top]
            new_chance[1:, top:] += pmf[top] * before
            new_tied_correct[1:, top:] += pmf[top] * (tied_correct[:-1, : k + 1 - top] + is_correct * before)
        chance, tied_correct = new_chance, new_tied_correct
    return float((tied_correct[1:, k] / np.arange(1, len(tied_correct))).sum())


def mean_interval(
    values: npt.ArrayLike,
    *,
    confidence: float,
    seed: int,
    samples_per_problem: int | None = None,
    num_resamples: int = 10_000,
) -> tuple[float, float]:
    """Interval of a mean over problems, which are taken as drawn from a larger population.

    Values that are all 0 or 1 get Wilson's interval (J. Am. Stat. Assoc. 22, 1927); the bootstrap fails there when the
    rate is near 0 or 1. Others get the bias-corrected and accelerated bootstrap over problems (BCa; Efron, J. Am. Stat.
    Assoc. 82, 1987), its levels widened by the ratio of Student's quantile to the normal one and by √(N / (N − 1))
    (Hesterberg, Am. Stat. 69, 2015), without which it is too narrow at 30 problems.

    Args:
        values: [N] in [0, 1], one per problem.
        confidence: Such as 0.95.
        seed: Of the resampling; equal seeds give equal intervals.
        samples_per_problem: Resample the samples inside every resampled problem too: values are then shares of this
            many 0/1 samples. The values' own spread already holds the samples' noise, so this is wider than needed
            for the population.
        num_resamples: Bootstrap repeats; with 10,000 the limits vary by about a hundredth of the width over seeds.

    Returns:
        Lower and upper limit, in [0, 1].

    Raises:
        ValueError: There are no values, or a value or the confidence is out of range.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError("values: must be a list of at least one problem's value")
    if not (np.all((x >= 0) & (x <= 1)) and 0 < confidence < 1):
        raise ValueError("values and confidence: must lie in [0, 1] and (0, 1)")
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    # A single fractional value, or many equal ones, tell nothing of the spread; Wilson's interval is then a wide one.
    if np.all((x == 0) | (x == 1)) or np.ptp(x) == 0:
        return wilson_interval(float(x.sum()), x.size, confidence)
    mean = float(x.mean())
    means = _resampled_means(x, samples_per_problem, num_resamples, np.random.default_rng(seed))
    # Equal means may differ in their rounding; they count half.
    below = (np.count_nonzero(means < mean - 1e-12) + np.count_nonzero(means <= mean + 1e-12)) / (2 * num_resamples)
    bias = NormalDist().inv_cdf(min(max(below, 1 / num_resamples), 1 - 1 / num_resamples))
    deviations = x - mean
    acceleration = float((deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5))
    wide = math.sqrt(x.size / (x.size - 1)) * _student_quantile(quantile, x.size - 1)
    levels = [_corrected_level(side, bias, acceleration) for side in (-wide, wide)]
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def _corrected_level(quantile: float, bias: float, acceleration: float) -> float:
    """Share of resampled means below a limit (equation 2.3 of Efron, 1987)."""
    moved = bias + quantile
    stretch = 1 - acceleration * moved
    # Past the correction's pole every resampled mean lies inside.
    return NormalDist().cdf(bias + moved / stretch) if stretch > 0 else float(quantile > 0)


def _resampled_means(
    values: Array, samples_per_problem: int | None, num_resamples: int, rng: np.random.Generator
) -> Array:
    """[num_resamples] float64. Problems of equal value are drawn together: how often, not which."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = rng.multinomial(values.size, counts / values.size, num_resamples)
    if samples_per_problem is None:
        return drawn @ distinct / values.size
    correct = rng.binomial(drawn * samples_per_problem, distinct)
    return correct.sum(axis=1) / (values.size * samples_per_problem)


def _student_quantile(normal_quantile: float, degrees: int) -> float:
    """Student's quantile from the normal one, to 4 digits from 5 degrees of freedom (Abramowitz & Stegun, 26.7.5)."""
    z = normal_quantile
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927).

    Args:
        successes: Number, or sum of fractional scores.
        trials: At least 1.
        confidence: Such as 0.95.
    """
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    spread = quantile**2 / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = quantile / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
