import pytest

from megatron_fipo.trainer.evaluation import wilson_interval

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
