"""Runs that generate with a real SGLang server, and are asked to end, with a server given by its URL or their own."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_fipo.config.load import dump_config
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.exit_codes import GO_ON
from tests.cli_ranks import CliRanks
from tests.integration.small_runs import prompts, read_lines, small_run, write_inputs
from tests.server_faults import server_lives, signal_all, wait_until
from tests.sglang_servers import RunningServer, needs_sglang

pytestmark = [pytest.mark.distributed, needs_sglang, pytest.mark.timeout(1200)]


def write_colocated(root: Path, model: Path | None, sglang: SglangConfig) -> tuple[Path, Path]:
    """Write a configuration in which servers and trainer have the devices in turn; gives it and the run directory."""
    changes: dict[str, Any] = {} if model is None else {"model": {"path": model, "dtype": "float32"}}
    config = small_run(
        root,
        "run",
        num_steps=3,
        data=prompts(root),
        parallelism={"tensor_model_parallel_size": 2, "sequence_parallel": True},
        rollout={"engine": "sglang", "colocated": True, "sglang": sglang},
        checkpoint={"every_steps": 100, "export_at_end": False},
        **changes,
    )
    path = root / "run.yaml"
    path.write_text(dump_config(config))
    return path, config.output_dir


def check_whole(folder: Path) -> None:
    """The run has every step once, and its servers had the weights of each."""
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["policy_version"] for line in lines] == [0, 1, 2, 3]
    assert all(line["rollout/canary_mismatch_max"] <= 1e-4 for line in lines)


def test_a_colocated_run_goes_on(tmp_path: Path, sglang_server: RunningServer) -> None:
    """It is asked to end while the servers have the devices, and gives its checkpoint's memory to them later."""
    root = write_inputs(tmp_path)
    key_file = root / "key"
    key_file.write_text(sglang_server.api_key)
    servers = SglangConfig(urls=(sglang_server.url,), api_key_file=str(key_file))
    path, folder = write_colocated(root, sglang_server.model, servers)
    with CliRanks(tmp_path / "first", ["train", path], hold_at=(2, "rollout"), holding=1) as ranks:
        ranks.wait_until_held(300.0)
        ranks.send(signal.SIGTERM)
        ranks.go_on()
        assert ranks.wait(60.0)[0] == [GO_ON, GO_ON]
        assert CheckpointStore(folder / "checkpoints").steps() == [1]
    with CliRanks(tmp_path / "second", ["train", path]) as ranks:
        assert ranks.wait(300.0)[0] == [0, 0]
    check_whole(folder)


@pytest.mark.exhaustive
def test_a_signal_to_a_colocated_run_and_its_servers(tmp_path: Path) -> None:
    """As when Slurm ends a job: servers that are gone cannot give memory back, and need not."""
    root = write_inputs(tmp_path)
    small = SglangConfig(server_arguments={"max_total_tokens": 4096, "max_running_requests": 32})
    path, folder = write_colocated(root, None, small)
    with CliRanks(tmp_path / "first", ["train", path], hold_at=(2, "rollout"), holding=1) as ranks:
        ranks.wait_until_held(300.0)
        (controller,) = (
            process
            for process in psutil.Process(ranks.processes[0].pid).children()
            if "megatron_fipo.trainer.controller_process" in process.cmdline()
        )
        server = server_lives(controller.pid)["server0"]
        signal_all(server, signal.SIGTERM)
        wait_until(lambda: server_lives(controller.pid).get("server0") != server, "the end of the server")
        ranks.send(signal.SIGTERM)
        ranks.go_on()
        statuses, seconds = ranks.wait(120.0)
        # No server has been started again to be told to give memory back.
        assert statuses == [GO_ON, GO_ON] and seconds < 15.0
        assert CheckpointStore(folder / "checkpoints").steps() == [1]
    with CliRanks(tmp_path / "second", ["train", path]) as ranks:
        assert ranks.wait(300.0)[0] == [0, 0]
    check_whole(folder)


@pytest.mark.exhaustive
def test_a_wait_for_servers_is_broken_off_and_the_run_goes_on(tmp_path: Path, sglang_server: RunningServer) -> None:
    """Each signal comes to one rank: while servers generate, while they evaluate, and while the trainer trains."""
    root = write_inputs(tmp_path)
    key_file = root / "key"
    key_file.write_text(sglang_server.api_key)
    config = small_run(
        root,
        "run",
        num_steps=3,
        model={"path": sglang_server.model, "dtype": "float32"},
        data=prompts(root, held_out="held_out"),
        evaluation={"num_prompts": 4, "every_steps": 1},
        parallelism={"max_tokens_per_micro_batch": 64, "context_parallel_size": 2},
        rollout={"engine": "sglang", "sglang": SglangConfig(urls=(sglang_server.url,), api_key_file=str(key_file))},
        checkpoint={"every_steps": 100, "export_at_end": False},
    )
    path = root / "run.yaml"
    path.write_text(dump_config(config))
    # Rank 1 is held, so that rank 0 is in its wait for the controller, or in a collective.
    stops = [((2, "rollout"), 0, [1]), ((2, "evaluation"), 1, [1, 2]), ((3, "update"), 1, [2, 3])]
    for attempt, (place, asked, saved) in enumerate(stops):
        with CliRanks(tmp_path / str(attempt), ["train", path], hold_at=place, holding=1) as ranks:
            ranks.wait_until_held(300.0)
            ranks.send(signal.SIGUSR1, asked)
            ranks.go_on()
            statuses, seconds = ranks.wait(120.0)
            assert statuses == [GO_ON, GO_ON]
            assert seconds < 30.0
            assert CheckpointStore(config.output_dir / "checkpoints").steps() == saved
            assert "Traceback" not in ranks.told(0) + ranks.told(1)
    with CliRanks(tmp_path / "last", ["train", path]) as ranks:
        assert ranks.wait(300.0)[0] == [0, 0]
    lines = read_lines(config.output_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["policy_version"] for line in lines] == [0, 1, 2, 3]
    assert all("eval/accuracy" in line for line in lines)
