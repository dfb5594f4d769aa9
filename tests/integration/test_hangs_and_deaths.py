"""Real runs one of whose ranks dies or stands still: the others end within seconds, and say which one it was."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config.load import dump_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.exit_codes import FAILED, GO_ON
from megatron_fipo.trainer import loop
from megatron_fipo.trainer import ranks as ranks_of_run
from megatron_fipo.trainer.state import Run
from tests.cli_ranks import CliRanks
from tests.integration.small_runs import small_run, write_inputs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

DEATH_S = 10.0
"""A second of grace, and what two busy cores need."""
STALL = {"stall_after_s": 4.0, "long_stall_after_s": 4.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("hangs"))


def endless(root: Path, name: str, context_parallel_size: int = 2, **changes: object) -> RunConfig:
    sizes = {"max_tokens_per_micro_batch": 64, "context_parallel_size": context_parallel_size}
    return small_run(root, name, num_steps=1000, parallelism=sizes, **changes)


def train(config: RunConfig) -> list[object]:
    path = config.output_dir.with_suffix(".yaml")
    path.write_text(dump_config(config))
    return ["train", path]


def only_report(config: RunConfig) -> str:
    (path,) = (config.output_dir / "logs").glob("stall_*.txt")
    return path.read_text()


@pytest.mark.parametrize(
    ("killed", "phase"),
    [
        (1, "rollout"),
        (0, "update"),
        pytest.param(0, "rollout", marks=pytest.mark.exhaustive),
        pytest.param(2, "weight_sync", marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_rank_ends_the_others_with_one_line(killed: int, phase: str, root: Path, tmp_path: Path) -> None:
    config = endless(root, f"killed_{killed}_{phase}", 3)
    with CliRanks(tmp_path, train(config), world_size=3, hold_at=(2, phase), holding=killed) as ranks:
        ranks.wait_until_held()
        pid = ranks.processes[killed].pid
        ranks.send(signal.SIGKILL, killed)
        survivors = [rank for rank in range(3) if rank != killed]
        if phase == "update":
            # A launcher ends the others once one has died.
            ranks.send(signal.SIGTERM, *survivors)
        statuses, seconds = ranks.wait(60.0, *survivors)
        assert statuses == [GO_ON, GO_ON]
        assert seconds < DEATH_S
        told = "".join(ranks.told(rank) for rank in survivors)
        (line,) = [line for line in told.splitlines() if line.startswith("megatron-fipo: ")]
        who = rf"rank {killed} \(\S+, process {pid}\)"
        assert re.fullmatch(
            f"megatron-fipo: the run stopped: {who} died without a word; the same command goes on", line
        )
        assert "Traceback" not in told


@pytest.mark.exhaustive
def test_a_second_breakdown_without_a_checkpoint_between_is_a_failure(root: Path, tmp_path: Path) -> None:
    config = endless(root, "again", checkpoint={"every_steps": 2})
    for attempt, (step, expected) in enumerate([(2, GO_ON), (1, FAILED), (4, GO_ON), (4, FAILED)]):
        with CliRanks(tmp_path / str(attempt), train(config), hold_at=(step, "update"), holding=1) as ranks:
            ranks.wait_until_held()
            ranks.send(signal.SIGKILL, 1)
            assert ranks.wait(60.0, 0)[0] == [expected], attempt


def test_a_rank_that_alone_meets_an_error_of_the_run_does_not_wait_for_the_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such errors are to be raised on every rank; one that is not must not hang the run."""
    compute = loop.compute_old_log_probs

    def compute_or_refuse(run: Run, micro_batches: Any) -> None:
        if run.context.rank == 1 and run.finished_steps == 1:
            raise RunError("only here")
        compute(run, micro_batches)

    monkeypatch.setattr(loop, "compute_old_log_probs", compute_or_refuse)
    monkeypatch.setattr(ranks_of_run, "_MEETING_PATIENCE_S", 2.0)
    with CliRanks(tmp_path, train(endless(root, "apart"))) as ranks:
        statuses, _ = ranks.wait(60.0)
        assert statuses == [FAILED, FAILED]
        assert "this rank ended, the others did not: only here" in ranks.told(1)
        assert re.search(r"rank 1 \(.*\) failed: RanksApartError: this rank ended", ranks.last_line(0))


def test_a_rank_that_fails_is_told_with_its_error(root: Path, tmp_path: Path) -> None:
    """Rank 1 alone raises; the others are in a collective with it."""
    config = endless(root, "failing")
    with CliRanks(tmp_path, train(config), hold_at=(2, "update"), holding=1) as ranks:
        ranks.wait_until_held()
        ranks.fail("no such thing")
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [FAILED, FAILED]
        assert seconds < DEATH_S
        assert re.fullmatch(
            r"megatron-fipo: the run stopped: rank 1 \(\S+, process \d+\) failed: KeyError: 'no such thing'",
            ranks.last_line(0),
        )
        assert "Traceback" not in ranks.told(0)
        assert ranks.told(1).count("Traceback (most recent call last)") == 1


def test_a_stopped_rank_is_named_by_the_stall_report(root: Path, tmp_path: Path) -> None:
    config = endless(root, "stopped", watchdog=STALL)
    with CliRanks(tmp_path, train(config), hold_at=(2, "old_log_probs"), holding=1) as ranks:
        ranks.wait_until_held()
        pid = ranks.processes[1].pid
        ranks.send(signal.SIGSTOP, 1)
        statuses, seconds = ranks.wait(60.0, 0)
        assert statuses == [GO_ON]
        # Its last sign of life came before the signal.
        assert 2.5 < seconds < 4.0 + 10.0 + DEATH_S, "it waits ten seconds for an answer"
        report = only_report(config)
        missing = (
            rf"rank 1 \(\S+, process {pid}\) has not been heard of for 1?\d s: it is stopped, or its node is out of"
        )
        assert re.search(missing, report)
        assert re.search(missing, ranks.last_line(0))
        assert re.search(
            r": the run hangs: nothing has been heard of a rank for \d+ s \(watchdog\.stall_after_s = 4\); rank 1 .*"
            r"; all of it is in \S+\.txt; the same command goes on$",
            ranks.last_line(0),
        )
        # It is woken, and hears that the run has ended.
        assert ranks.wait(10.0, 1)[0] == [GO_ON]


def test_the_stall_report_tells_who_waits_for_whom(root: Path, tmp_path: Path) -> None:
    """Rank 1 stands still in Python code of its own, while rank 0 waits for it in a collective."""
    config = endless(root, "waiting", watchdog=STALL)
    with CliRanks(tmp_path, train(config), hold_at=(2, "update"), holding=1) as ranks:
        ranks.wait_until_held()
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [GO_ON, GO_ON]
        assert 4.0 < seconds < 4.0 + DEATH_S
        report = only_report(config)
        assert re.search(r"rank 1 \(\S+, process \d+\) did not come to gloo:\w+ number \d+ of group ", report)
        assert "step 2, update" in report
        assert "micro-batch 1 of " in report
        assert "thread watchdog" not in report
        # Where each of them is, in Python.
        assert "WAITS IN IT" in report
        assert report.count("thread MainThread:") == 2
        assert "update_policy" in report
        assert "text := parent.recv()" in report
        assert "Traceback" not in ranks.told(0) + ranks.told(1)


@pytest.mark.exhaustive
def test_the_stall_report_sees_through_waits_between_pipeline_stages(root: Path, tmp_path: Path) -> None:
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    config = small_run(root, "stages", num_steps=1000, parallelism=sizes, watchdog=STALL | {"long_stall_after_s": 60.0})
    with CliRanks(tmp_path, train(config), world_size=8, hold_at=(2, "update"), holding=5) as ranks:
        ranks.wait_until_held()
        assert ranks.wait(60.0)[0] == [GO_ON] * 8
    named = re.findall(r"^  (.*) did not come to ", only_report(config), re.MULTILINE)
    assert named and all(re.fullmatch(r"rank 5 \(\S+, process \d+\)", each) for each in named)


@pytest.mark.exhaustive
def test_ranks_end_where_rank_0_is_stopped(root: Path, tmp_path: Path) -> None:
    config = endless(root, "headless", watchdog=STALL)
    with CliRanks(tmp_path, train(config), hold_at=(2, "old_log_probs")) as ranks:
        ranks.wait_until_held()
        ranks.send(signal.SIGSTOP, 0)
        statuses, seconds = ranks.wait(60.0, 1)
        assert statuses == [GO_ON]
        assert 4.0 < seconds < 4.0 + 10.0 + DEATH_S
        assert re.search(
            r"the run hangs: rank 0 \(.*\) has not been heard of for \d+ s; all of it is in", ranks.told(1)
        )
        assert ranks.wait(10.0, 0)[0] == [GO_ON]
        assert "died" not in ranks.told(0) + ranks.told(1)
        assert "thread MainThread:" in only_report(config)
