from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.runtime.retention import Retention

SCORES = st.dictionaries(st.integers(0, 60), st.none() | st.integers(-5, 5).map(float), min_size=1)


def test_each_rule_keeps_its_own() -> None:
    scores = {10: 0.5, 20: 0.9, 25: None, 30: 0.9, 35: 0.1, 40: 0.2}
    assert Retention(keep_last=1).kept(scores) == {40}
    assert Retention(keep_last=2, keep_every=10).kept(scores) == {10, 20, 30, 35, 40}
    assert Retention(keep_last=1, keep_best=1).kept(scores) == {30, 40}, "of equals the later one"
    assert Retention(keep_last=1, keep_best=2, highest_is_best=False).kept(scores) == {35, 40}
    assert Retention(keep_last=1, keep_best=9).kept(scores) == {10, 20, 30, 35, 40}


@given(SCORES, st.integers(0, 4), st.integers(0, 7), st.integers(0, 4), st.booleans())
def test_the_newest_always_stays(
    scores: dict[int, float | None], last: int, every: int, best: int, highest: bool
) -> None:
    retention = Retention(keep_last=last, keep_every=every, keep_best=best, highest_is_best=highest)
    kept = retention.kept(scores)
    assert max(scores) in kept <= scores.keys()
    lost = scores.keys() - kept
    assert all(step not in sorted(scores)[-last:] for step in lost) or last == 0
    assert not [step for step in lost if every and step % every == 0]
