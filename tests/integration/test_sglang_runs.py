"""A run that generates with a real SGLang server, which hangs once and dies once, to the end of all processes."""

import math
import os
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.rollout.journal import JournalEntry, journal_path, read_journal
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.trainer.state import Run
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import Ended, prompts, read_lines, run_to_its_end, small_run, write_inputs
from tests.marked_processes import command_lines, mark_own_children
from tests.server_faults import (
    ServerLife,
    check_every_draw_ends_once,
    server_lives,
    signal_all,
    unread_requests,
    wait_until,
)
from tests.sglang_servers import needs_sglang

pytestmark = [pytest.mark.distributed, needs_sglang, pytest.mark.timeout(1000)]

STEPS = 3
STEP_OF_HANG, STEP_OF_DEATH = 2, 3
HANG_S = 3.0


class Faults(Progress):
    """Has the server hang with a rollout's requests on their way to it; once it goes on, and once it dies at them.

    Attributes:
        num_requests: Requests that were on their way, by step.
    """

    def __init__(self) -> None:
        self.controller = 0
        self.num_requests: dict[int, int] = {}
        self._stopped: ServerLife | None = None

    def find_controller(self, run: Run) -> None:
        """Learn which process has the servers."""
        if run.is_main:
            self.controller = run.rollout.calls.link.process.pid  # type: ignore[union-attr]

    def begin_step(self, step: int) -> None:
        """Before anything is asked for."""
        if step in (STEP_OF_HANG, STEP_OF_DEATH):
            (self._stopped,) = server_lives(self.controller).values()
            signal_all(self._stopped, signal.SIGSTOP)
            self.num_requests[step] = 0

    def advance(self, done: int, total: int) -> None:
        """After the controller has begun the rollout."""
        if self._stopped is None or done:
            return
        life, self._stopped = self._stopped, None
        wait_until(lambda: unread_requests(life.port) >= total, "a rollout under way")
        step = max(self.num_requests)
        self.num_requests[step] = unread_requests(life.port)
        if step == STEP_OF_HANG:
            time.sleep(HANG_S)
            signal_all(life, signal.SIGCONT)
        else:
            signal_all(life, signal.SIGCONT)
            wait_until(lambda: not unread_requests(life.port), "a server that has read its requests")
            os.kill(life.processes("scheduler")[-1], signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    config: RunConfig
    lines: list[dict[str, Any]]
    journal: list[JournalEntry]
    num_requests: dict[int, int]
    left_behind: list[str]


def run_marked(mark: str, config: RunConfig) -> tuple[Ended, dict[int, int]]:
    mark_own_children(mark)
    quiet_upstream()
    faults = Faults()
    progress = faults if dist.get_rank() == 0 else NO_PROGRESS
    return run_to_its_end(config, faults.find_controller, progress), faults.num_requests


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Three steps on two ranks, with a server of two ranks of its own, and weights by broadcast over gloo."""
    root = write_inputs(tmp_path_factory.mktemp("sglang"))
    config = small_run(
        root,
        "served",
        num_steps=STEPS,
        data=prompts(root, held_out="held_out"),
        parallelism={"tensor_model_parallel_size": 2, "sequence_parallel": True},
        rollout={
            "engine": "sglang",
            "sglang": SglangConfig(
                tensor_parallel_size=2, server_arguments={"max_total_tokens": 4096, "max_running_requests": 32}
            ),
        },
    )
    mark = uuid.uuid4().hex
    ends = run_distributed(run_marked, 2, mark, config, timeout_s=900.0)
    assert [ended.error for ended, _ in ends] == [(), ()]
    folder = config.output_dir
    journal = [read_journal(journal_path(folder / "journal", step)) for step in range(1, STEPS + 1)]
    return Outcome(config, read_lines(folder / "metrics.jsonl"), journal, ends[0][1], command_lines(mark))


def test_after_every_sync_the_server_has_the_actors_weights(outcome: Outcome) -> None:
    assert [line["policy_version"] for line in outcome.lines] == [0, 1, 2, 3]
    for line in outcome.lines:
        assert line["rollout/canary_mismatch_max"] <= 1e-4
        # The server that took the dead one's place was given the weights of the step before.
        num_times = 2 if line["step"] == STEP_OF_DEATH else 1
        assert (line["perf/weight_sync_servers"], line["perf/weight_sync_servers_failed"]) == (num_times, 0)
        assert line["perf/weight_sync_gib"] > 0 and line["time/weight_sync_s"] > 0


def test_responses_are_scored_by_the_policy_that_gave_them(outcome: Outcome) -> None:
    for line in outcome.lines[1:]:
        assert 0 < line["train/mismatch_mean_abs"] < 1e-5
        assert line["fipo/null_future_kl_std"] == 0.0
    # The initial weights would have told other log-probabilities from the second step on.
    initial = AutoModelForCausalLM.from_pretrained(outcome.config.model.path, dtype=torch.float32)
    distances = [mean_distance(initial, entry) for entry in outcome.journal]
    assert distances[0] < 1e-5
    assert min(distances[1:]) > 1e-3


def mean_distance(model: Any, entry: JournalEntry) -> float:
    """Mean |Δ| between journalled log-probabilities and those of a model."""
    deltas = []
    for group in entry.groups:
        for sample in group.samples:
            ids = np.concatenate([group.prompt.token_ids, sample.response_token_ids]).astype(np.int64)
            with torch.no_grad():
                logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
            own = logits.log_softmax(-1).gather(1, torch.from_numpy(ids)[1:, None])[-len(sample.response_token_ids) :]
            deltas.append(np.abs(own[:, 0].numpy() - sample.rollout_log_probs).mean())
    return float(np.mean(deltas))


def test_the_server_dies_once_amid_requests_and_is_replaced(outcome: Outcome) -> None:
    num_samples = outcome.config.rollout.num_prompts_per_step * outcome.config.rollout.group_size
    assert all(outcome.num_requests[step] >= num_samples for step in (STEP_OF_HANG, STEP_OF_DEATH))
    lives = {path.name for path in (outcome.config.output_dir / "servers").glob("*.log")}
    assert lives == {"server0.life1.log", "server0.life2.log"}


def test_every_batch_is_in_the_journal_and_every_draw_ends_once(outcome: Outcome) -> None:
    assert [entry.policy_version for entry in outcome.journal] == [0, 1, 2]
    ends = check_every_draw_ends_once(outcome.journal, outcome.config.rollout)
    assert ends["used"] == STEPS * outcome.config.rollout.num_prompts_per_step


def test_metrics_are_declared_and_finite(outcome: Outcome) -> None:
    for line in outcome.lines:
        assert not CATALOGUE.undeclared(line)
        assert all(math.isfinite(number) for value in line.values() for number in as_list(value))


def as_list(value: Any) -> Sequence[float]:
    return value if isinstance(value, list) else [value]


def test_files_of_a_served_run(outcome: Outcome) -> None:
    folder = outcome.config.output_dir
    names = {path.name for path in folder.iterdir()}
    assert {"journal", "servers", "export", "samples.jsonl", "tokens", "evaluations"} <= names
    assert len(read_lines(folder / "evaluations" / "step_3" / "problems.jsonl")) == 8
    assert len(read_lines(folder / "samples.jsonl")) == 3 * STEPS


def test_no_process_is_left(outcome: Outcome) -> None:
    assert outcome.left_behind == []
