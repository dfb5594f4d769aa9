from pathlib import Path

from megatron_fipo.runtime.exit_codes import FAILED, GO_ON
from megatron_fipo.runtime.watchdog.breakdowns import breakdown_statuses


def checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step_{step}").mkdir(parents=True)


def test_a_run_is_started_again_as_long_as_it_gets_further(tmp_path: Path) -> None:
    assert breakdown_statuses(tmp_path)() == GO_ON
    assert breakdown_statuses(tmp_path)() == FAILED
    checkpoint(tmp_path, 20)
    assert breakdown_statuses(tmp_path)() == GO_ON
    attempt = breakdown_statuses(tmp_path)
    checkpoint(tmp_path, 40)
    assert attempt() == GO_ON
    assert breakdown_statuses(tmp_path)() == FAILED


def test_all_ranks_of_an_attempt_come_to_the_same_status(tmp_path: Path) -> None:
    """Each asks by itself where rank 0 is what has died."""
    ranks = [breakdown_statuses(tmp_path) for _ in range(3)]
    assert [status() for status in ranks] == [GO_ON, GO_ON, GO_ON]
    assert [path.name for path in tmp_path.iterdir()] == ["last_breakdown"]


def test_a_run_whose_checkpoints_cannot_be_listed_is_not_started_for_ever(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    assert breakdown_statuses(tmp_path)() == GO_ON
    assert breakdown_statuses(tmp_path)() == FAILED


def test_a_directory_that_cannot_be_written_to_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert breakdown_statuses(tmp_path / "file" / "run")() == GO_ON
