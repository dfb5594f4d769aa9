"""Faults of real servers at random moments of runs that go on: every sample counts exactly once.

`MEGATRON_FIPO_FAULT_REPORT` names a file that takes a line of JSON for each run; runs that it has are not repeated.
"""

import json
import os
import uuid
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.rollout.journal import journal_path, read_journal
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.runtime.progress import NO_PROGRESS
from megatron_fipo.trainer.state import Run
from tests.distributed_helpers import run_distributed
from tests.fault_campaign import Campaign, EndingRollouts, as_values, plan
from tests.integration.small_runs import Ended, prompts, read_lines, run_to_its_end, small_run, write_inputs
from tests.marked_processes import left_after, mark_own_children
from tests.server_faults import check_every_draw_ends_once
from tests.sglang_servers import needs_sglang

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive, needs_sglang, pytest.mark.timeout(3000)]

FAULTS_OF_RUN = 5
PATIENCE_S = 60.0
# More steps than any run takes.
STEPS = 10000


@dataclass(frozen=True)
class Way:
    """A way to train, and the servers of it."""

    num_servers: int
    server_ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)


SYNCHRONOUS = Way(2, changes={"parallelism": {"pipeline_model_parallel_size": 2}})
AHEAD = Way(2, changes={"rollout": {"policy_lag": 1, "partial_rollouts": True, "over_sampling": 1.5}})
OF_TWO_RANKS = Way(1, server_ranks=2)
WAYS = (SYNCHRONOUS, AHEAD, SYNCHRONOUS, AHEAD, OF_TWO_RANKS)
FAULTS = [*batched(plan(202611, 20, num_servers=2), FAULTS_OF_RUN), *batched(plan(69, 5, num_servers=1), FAULTS_OF_RUN)]


def faulty_run(root: Path, number: int) -> RunConfig:
    way = WAYS[number]
    changes = {name: dict(section) for name, section in way.changes.items()}
    sglang = SglangConfig(
        servers_per_node=way.num_servers,
        tensor_parallel_size=way.server_ranks,
        server_arguments={"max_total_tokens": 4096, "max_running_requests": 32},
        start_timeout_s=300.0,
        max_restarts=20,
    )
    rollout = {"engine": "sglang", "sglang": sglang, "max_response_tokens": 96}
    rollout |= changes.pop("rollout", {})
    return small_run(
        root,
        f"faults_{number}",
        num_steps=STEPS,
        data=prompts(root, held_out="held_out"),
        rollout=rollout,
        parallelism={"max_tokens_per_micro_batch": 512} | changes.pop("parallelism", {}),
        evaluation={"num_prompts": 8, "every_steps": 3},
        # With a single checkpoint, at the end, the journal keeps every batch.
        checkpoint={"every_steps": STEPS},
        weight_sync=WeightSyncConfig(timeout_s=15.0),
        **changes,
    )


def run_with_faults(mark: str, config: RunConfig, number: int) -> tuple[Ended, Any, list[str]]:
    mark_own_children(mark)
    quiet_upstream()
    campaign = Campaign(FAULTS[number], WAYS[number].num_servers) if dist.get_rank() == 0 else None

    def change(run: Run) -> None:
        if campaign is not None:
            campaign.begin(run)
        run.rollout = EndingRollouts(run.rollout, campaign)  # type: ignore[arg-type, assignment]

    ended = run_to_its_end(config, change, campaign or NO_PROGRESS)
    told = None if campaign is None else (campaign.problem, [as_values(each) for each in campaign.outcomes])
    return ended, told, left_after(mark, PATIENCE_S)


def report_path() -> Path | None:
    name = os.environ.get("MEGATRON_FIPO_FAULT_REPORT")
    return None if name is None else Path(name)


@pytest.mark.parametrize("number", range(len(WAYS)))
def test_no_fault_loses_or_repeats_a_sample(tmp_path: Path, number: int) -> None:
    path = report_path()
    if path is not None and path.exists() and any(line["run"] == number for line in read_lines(path)):
        pytest.skip(f"{path} has it")
    config = faulty_run(write_inputs(tmp_path), number)
    ranks = config.parallelism.pipeline_model_parallel_size
    ends: list[Any] = run_distributed(run_with_faults, ranks, uuid.uuid4().hex, config, number, timeout_s=2700.0)
    assert [ended.error for ended, *_ in ends] == [()] * ranks
    problem, outcomes = ends[0][1]
    assert problem is None, outcomes
    assert len(outcomes) == FAULTS_OF_RUN and all(outcome["successor"] for outcome in outcomes)
    assert [left for *_, left in ends] == [[]] * ranks

    lines = read_lines(config.output_dir / "metrics.jsonl")
    num_steps = len(list((config.output_dir / "journal").iterdir()))
    assert [line["step"] for line in lines] == list(range(num_steps + 2))
    journal = [read_journal(journal_path(config.output_dir / "journal", step)) for step in range(1, num_steps + 1)]
    draws = check_every_draw_ends_once(journal, config.rollout)
    worst = max(line["rollout/canary_mismatch_max"] for line in lines if "rollout/canary_mismatch_max" in line)
    assert worst <= 1e-4
    mismatches = [line["train/mismatch_max"] for line in lines[1:-1]]
    if config.rollout.policy_lag == 0:
        assert max(mismatches) < 1e-4
    assert (config.output_dir / "export").is_dir()
    if path is not None:
        told = {"run": number, "faults": outcomes, "steps": num_steps, "draws": draws, "mismatch_max": max(mismatches)}
        with path.open("a") as file:
            file.write(json.dumps(told) + "\n")
