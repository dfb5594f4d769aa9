"""Measures how often the intervals of Avg@32 and of rates hold: `python tools/simulate_interval_coverage.py [REPEATS]`.

A simulated benchmark draws each problem's chance of a right response from Beta(a, b), then 32 responses. The interval
holds where it contains the mean chance a / (a + b).
"""

import sys

import numpy as np

from megatron_fipo.metrics.estimators import mean_interval

SAMPLES = 32
RESAMPLES = 2000
CHANCES = ((0.3, 0.3), (0.5, 0.5), (2.0, 2.0), (0.3, 1.2), (0.2, 3.0), (0.1, 4.0))
RATES = (0.03, 0.1, 0.5, 0.83)


def main() -> None:
    """Print one line for every kind of benchmark."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    for num_problems in (30, 200):
        for a, b in CHANCES:
            shares = [_share_of_averages(num_problems, a, b, repeats, samples) for samples in (None, SAMPLES)]
            held = f"{shares[0]:.3f} over problems, {shares[1]:.3f} over problems and samples"
            print(f"{num_problems} problems, chances Beta({a}, {b}) of mean {a / (a + b):.3f}: {held}", flush=True)
        for rate in RATES:
            held = f"{_share_of_rates(num_problems, rate, repeats):.3f}"
            print(f"{num_problems} problems, right or wrong, rate {rate}: {held}", flush=True)


def _share_of_averages(num_problems: int, a: float, b: float, repeats: int, samples_per_problem: int | None) -> float:
    rng = np.random.default_rng(5)
    held = 0
    for repeat in range(repeats):
        values = rng.binomial(SAMPLES, rng.beta(a, b, num_problems)) / SAMPLES
        low, high = mean_interval(
            values,
            confidence=0.95,
            seed=repeat,
            samples_per_problem=samples_per_problem,
            num_resamples=RESAMPLES,
        )
        held += low <= a / (a + b) <= high
    return held / repeats


def _share_of_rates(num_problems: int, rate: float, repeats: int) -> float:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(repeats):
        low, high = mean_interval(rng.binomial(1, rate, num_problems), confidence=0.95, seed=0)
        held += low <= rate <= high
    return held / repeats


if __name__ == "__main__":
    main()
