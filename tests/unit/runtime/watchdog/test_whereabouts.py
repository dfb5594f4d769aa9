from pathlib import Path

from megatron_fipo.runtime.progress import Progress
from megatron_fipo.runtime.timing import PhaseTimer
from megatron_fipo.runtime.watchdog.whereabouts import Whereabouts


class Notes(Progress):
    def __init__(self) -> None:
        self.noted: list[tuple[object, ...]] = []

    def __getattribute__(self, name: str) -> object:
        if name in vars(Progress) and not name.startswith("_"):
            return lambda *arguments: self.noted.append((name, *arguments))
        return super().__getattribute__(name)


def test_a_rank_is_where_it_was_told_last() -> None:
    where = Whereabouts()
    timer = PhaseTimer(where)
    assert (where.told()["step"], where.told()["phase"]) == (0, "start_up")
    where.begin_run(Path("run"), 3)
    where.begin_step(2)
    with timer.phase("update"):
        where.advance(1, 4)
        where.begin_micro_batch(3, 8)
        with timer.phase("inner"):
            assert where.told()["phase"] == "inner"
        assert where.told() | {"changes": 0} == {
            "step": 2,
            "phase": "update",
            "work": (0, 0),
            "micro_batch": (0, 0),
            "queues": {},
            "changes": 0,
        }
        where.begin_micro_batch(4, 8)
        assert where.told()["micro_batch"] == (4, 8)
    assert where.told()["phase"] == "between_phases"


def test_everything_told_is_a_sign_of_work_but_queues_that_stay_as_they_are() -> None:
    where = Whereabouts()

    def changes() -> int:
        return int(where.told()["changes"])

    before = changes()
    where.advance(3, 9)
    where.advance(3, 9)
    where.show_response("1+1=", "2", 1.0)
    assert changes() == before + 3
    where.show_queues({"requests in flight": 4})
    before = changes()
    where.show_queues({"requests in flight": 4})
    assert changes() == before
    where.show_queues({"requests in flight": 3})
    assert changes() == before + 1


def test_a_watcher_hears_everything() -> None:
    notes = Notes()
    where = Whereabouts(notes)
    told: list[tuple[object, ...]] = [
        ("begin_run", Path("run"), 3),
        ("begin_step", 1),
        ("begin_phase", "update"),
        ("advance", 1, 2),
        ("begin_micro_batch", 1, 2),
        ("show_queues", {"a": 1}),
        ("show_response", "p", "r", 1.0),
        ("end_phase", "update", 0.5),
        ("end_step", 1, {"a": 1.0}),
        ("close",),
    ]
    for name, *arguments in told:
        getattr(where, str(name))(*arguments)
    assert notes.noted == told
    assert {str(name) for name, *_ in told} == {name for name in vars(Progress) if not name.startswith("_")}
