"""Runs that generate with a real SGLang server, and are asked to end; the server is one that is given by its URL."""

import signal
from pathlib import Path

import pytest

from megatron_fipo.config.load import dump_config
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.exit_codes import GO_ON
from tests.cli_ranks import CliRanks
from tests.integration.small_runs import prompts, read_lines, small_run, write_inputs
from tests.sglang_servers import RunningServer, needs_sglang

pytestmark = [pytest.mark.distributed, needs_sglang, pytest.mark.exhaustive, pytest.mark.timeout(1200)]


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
