import time

import pytest

from megatron_fipo.runtime.progress import Progress
from megatron_fipo.runtime.timing import PhaseTimer


def test_phases_add_up_by_name_until_they_are_drained() -> None:
    timer = PhaseTimer()
    started = time.perf_counter()
    with timer.phase("rollout"):
        time.sleep(0.02)
    with timer.phase("rollout"):
        time.sleep(0.02)
    with timer.phase("update"):
        pass
    elapsed = time.perf_counter() - started
    times = timer.drain()
    assert list(times) == ["time/rollout_s", "time/update_s"]
    assert 0.04 <= times["time/rollout_s"] <= elapsed
    assert 0 <= times["time/update_s"] <= elapsed - times["time/rollout_s"]
    assert timer.drain() == {}


def test_a_phase_that_fails_is_counted() -> None:
    timer = PhaseTimer()
    with pytest.raises(ValueError, match="inside"), timer.phase("update"):
        raise ValueError("inside")
    assert timer.drain()["time/update_s"] >= 0


class Listener(Progress):
    def __init__(self) -> None:
        self.heard: list[tuple[str, float | None]] = []

    def begin_phase(self, name: str) -> None:
        self.heard.append((name, None))

    def end_phase(self, name: str, seconds: float) -> None:
        self.heard.append((name, seconds))


def test_every_phase_is_told_as_it_begins_and_ends_a_failing_one_too() -> None:
    listener = Listener()
    timer = PhaseTimer(listener)
    with timer.phase("rollout"):
        assert listener.heard == [("rollout", None)]
    with pytest.raises(ValueError, match="inside"), timer.phase("update"):
        raise ValueError("inside")
    times = timer.drain()
    assert listener.heard == [
        ("rollout", None),
        ("rollout", times["time/rollout_s"]),
        ("update", None),
        ("update", times["time/update_s"]),
    ]
