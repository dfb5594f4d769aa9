"""Real runs that are asked to end: the step under way is finished or given up, and all ranks end with one status."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fipo.config.load import dump_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.exit_codes import GO_ON, INTERRUPTED, TERMINATED
from tests.cli_ranks import BUILDING, CliRanks
from tests.integration.small_runs import prompts, read_lines, small_run, without_times, write_inputs
from tests.marked_processes import MARK, left_after

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

STAND_IN = Path(__file__).parents[1] / "stand_in_sglang"
TWO = {"max_tokens_per_micro_batch": 64, "context_parallel_size": 2}
BOUND_S = 10.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("stopping"))


def endless(root: Path, name: str, **changes: object) -> RunConfig:
    return small_run(root, name, num_steps=1000, **{"parallelism": TWO} | changes)


def train(config: RunConfig) -> list[object]:
    path = config.output_dir.with_suffix(".yaml")
    path.write_text(dump_config(config))
    return ["train", path]


def saved_steps(config: RunConfig) -> list[int]:
    return CheckpointStore(config.output_dir / "checkpoints").steps()


def ended(number: signal.Signals) -> str:
    """What rank 0 says."""
    return f"megatron-fipo: the run ended on {number.name}; the same command goes on"


def test_a_run_that_was_stopped_everywhere_is_the_run_that_never_was(root: Path, tmp_path: Path) -> None:
    """Each signal comes to one rank, while that is in the phase; then the same command is given again."""
    values = {
        "num_steps": 3,
        "parallelism": TWO,
        "data": prompts(root, held_out="held_out"),
        "evaluation": {"num_prompts": 4, "every_steps": 1},
        "checkpoint": {"every_steps": 100, "export_at_end": False},
    }
    whole, stopped = small_run(root, "whole", **values), small_run(root, "stopped", **values)
    with CliRanks(tmp_path / "whole", train(whole)) as ranks:
        assert ranks.wait(120.0)[0] == [0, 0]
    stops = [((1, "rollout"), 1, []), ((1, "update"), 0, [1]), ((2, "evaluation"), 1, [1, 2])]
    for place, asked, saved in stops:
        with CliRanks(tmp_path / str(saved), train(stopped), hold_at=place, holding=asked) as ranks:
            ranks.wait_until_held()
            ranks.send(signal.SIGUSR1, asked)
            ranks.go_on()
            statuses, seconds = ranks.wait(60.0)
            assert statuses == [GO_ON, GO_ON]
            assert seconds < BOUND_S
            assert saved_steps(stopped) == saved
    with CliRanks(tmp_path / "last", train(stopped)) as ranks:
        assert ranks.wait(120.0)[0] == [0, 0]
    lines = [read_lines(config.output_dir / "metrics.jsonl") for config in (stopped, whole)]
    assert without_times(lines[0]) == without_times(lines[1])


@pytest.mark.parametrize(
    ("phase", "asked", "number", "saved"),
    [
        ("rollout", 1, signal.SIGTERM, [1]),
        pytest.param("evaluation", 0, signal.SIGUSR1, [2], marks=pytest.mark.exhaustive),
        pytest.param("old_log_probs", 1, signal.SIGTERM, [2], marks=pytest.mark.exhaustive),
        pytest.param("update", 0, signal.SIGUSR1, [2], marks=pytest.mark.exhaustive),
        pytest.param("weight_sync", 1, signal.SIGTERM, [2], marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_to_one_rank_ends_all(
    phase: str, asked: int, number: signal.Signals, saved: list[int], root: Path, tmp_path: Path
) -> None:
    """The rank is in the phase when the signal comes, and goes on only afterwards."""
    evaluated = {"data": prompts(root, held_out="held_out"), "evaluation": {"num_prompts": 8, "every_steps": 1}}
    config = endless(root, f"in_{phase}", **evaluated if phase == "evaluation" else {})
    with CliRanks(tmp_path, train(config), hold_at=(2, phase), holding=asked) as ranks:
        ranks.wait_until_held()
        ranks.send(number, asked)
        ranks.go_on()
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [GO_ON, GO_ON]
        assert seconds < BOUND_S
        assert ranks.last_line(0) == ended(number)
        assert "Traceback" not in ranks.told(0)
        assert ranks.told(1) == ""
        assert saved_steps(config) == saved


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_rank_that_stands_still_is_woken_to_save(stopped: int, root: Path, tmp_path: Path) -> None:
    """Stopped by Ctrl-Z or a debugger, it would hold up the end until the launcher kills it."""
    config = endless(root, f"woken_{stopped}")
    with CliRanks(tmp_path, train(config), hold_at=(2, "update"), holding=stopped) as ranks:
        ranks.wait_until_held()
        ranks.send(signal.SIGSTOP, stopped)
        ranks.go_on()
        ranks.send(signal.SIGTERM, 1 - stopped)
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [GO_ON, GO_ON]
        assert seconds < BOUND_S
        assert ranks.last_line(0) == ended(signal.SIGTERM)
        assert saved_steps(config) == [2]


def test_ctrl_c_on_one_rank(root: Path, tmp_path: Path) -> None:
    config = small_run(root, "alone", num_steps=1000)
    with CliRanks(tmp_path, train(config), world_size=1, hold_at=(2, "rollout")) as ranks:
        ranks.wait_until_held()
        ranks.send(signal.SIGINT)
        ranks.go_on()
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [INTERRUPTED]
        assert seconds < BOUND_S
        assert ranks.last_line() == ended(signal.SIGINT)
        assert saved_steps(config) == [1]
        assert "Traceback" not in ranks.told()


def test_a_second_ctrl_c_ends_the_run_at_once(root: Path, tmp_path: Path) -> None:
    config = endless(root, "twice")
    with CliRanks(tmp_path, train(config), hold_at=(2, "update"), holding=1) as ranks:
        ranks.wait_until_held()
        ranks.send(signal.SIGINT)
        # A launcher hands on what the terminal has sent already.
        ranks.send(signal.SIGINT)
        assert ranks.wait(1.2)[0] == [None, None]
        ranks.send(signal.SIGINT, 0)
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [INTERRUPTED, INTERRUPTED]
        assert seconds < 4.0
        assert ranks.last_line() == "megatron-fipo: the run ended at once on a second SIGINT"


def test_a_run_that_takes_too_long_to_end_is_cut_off(root: Path, tmp_path: Path) -> None:
    config = endless(root, "slow", watchdog={"stop_within_s": 2.0})
    with CliRanks(tmp_path, train(config), hold_at=(2, "update"), holding=1) as ranks:
        ranks.wait_until_held()
        ranks.send(signal.SIGUSR1, 1)
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [GO_ON, GO_ON]
        assert 2.0 < seconds < 8.0
        assert "the run did not come to an end within 2 s after SIGUSR1; it goes on from" in ranks.last_line()


@pytest.mark.parametrize("place", [pytest.param("start_up", marks=pytest.mark.exhaustive), "export"])
def test_where_nothing_can_be_lost_a_run_ends_at_once(place: str, root: Path, tmp_path: Path) -> None:
    config = small_run(root, f"at_once_{place}", parallelism=TWO)
    hold_at = (1, "export") if place == "export" else BUILDING
    with CliRanks(tmp_path, train(config), hold_at=hold_at, holding=1) as ranks:
        ranks.wait_until_held()
        ranks.send(signal.SIGTERM, 1)
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [GO_ON, GO_ON]
        assert seconds < 4.0
        assert ranks.last_line() == "megatron-fipo: the run ended on SIGTERM; the same command goes on"
        assert ranks.told(1) == ""


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, TERMINATED),
        pytest.param(signal.SIGINT, INTERRUPTED, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGUSR1, GO_ON, marks=pytest.mark.exhaustive),
    ],
)
def test_an_evaluation_ends_at_once(number: signal.Signals, status: int, root: Path, tmp_path: Path) -> None:
    config = endless(root, f"evaluated_{number}", data=prompts(root, held_out="held_out"))
    words = ["evaluate", *train(config)[1:], "--output_dir", tmp_path / "results"]
    with CliRanks(tmp_path, words, world_size=1, hold_at=BUILDING) as ranks:
        ranks.wait_until_held()
        ranks.send(number)
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [status]
        assert seconds < 4.0
        assert ranks.last_line() == f"megatron-fipo: the evaluation ended on {number.name}; the same command goes on"


@pytest.mark.parametrize(
    ("words", "number", "status"),
    [
        (["train"], signal.SIGUSR1, GO_ON),
        (["train"], signal.SIGTERM, GO_ON),
        (["train"], signal.SIGINT, INTERRUPTED),
        (["evaluate"], signal.SIGTERM, TERMINATED),
        (["convert", "verify", "checkpoint"], signal.SIGINT, INTERRUPTED),
    ],
)
def test_a_signal_while_a_rank_imports_ends_it_with_its_status(
    words: list[str], number: signal.Signals, status: int, root: Path
) -> None:
    path = root / "importing.yaml"
    path.write_text(dump_config(small_run(root, "importing", data=prompts(root, held_out="held_out"))))
    command = [sys.executable, "-X", "importtime", "-m", "megatron_fipo.cli", *words, str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # One of the first things that torch brings, which then takes seconds.
        assert any("torch._utils" in line for line in process.stderr)
        process.send_signal(number)
        _, told = process.communicate(timeout=60.0)
    assert process.returncode == status
    assert told.splitlines()[-1] == f"megatron-fipo: {words[0]} ended on {number.name}"
    assert "Traceback" not in told
    assert not (root / "importing").exists()


def test_servers_end_with_a_run_that_is_stopped_while_they_start(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in takes SGLang's place, which does not become ready."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("STAND_IN_DELAY_S", "600")
    monkeypatch.setenv(MARK, str(tmp_path))
    config = endless(root, "served", rollout={"engine": "sglang"})
    with CliRanks(tmp_path, train(config), hold_at=BUILDING) as ranks:
        wait_until(lambda: any((config.output_dir / "servers").glob("server0.life1.log")))
        ranks.send(signal.SIGTERM, 1)
        statuses, seconds = ranks.wait(60.0)
        assert statuses == [GO_ON, GO_ON]
        assert seconds < BOUND_S
        assert left_after(str(tmp_path), 30.0) == []


def wait_until(happens: Callable[[], bool], patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)
