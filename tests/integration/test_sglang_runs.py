"""A run that generates with a real SGLang server, from the controller process to the end of all processes."""

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.rollout.journal import JournalEntry, journal_path, read_journal
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import Ended, prompts, read_lines, run_in_turn, small_run, write_inputs
from tests.marked_processes import command_lines, mark_own_children

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]

STEPS = 3


@dataclass(frozen=True)
class Outcome:
    config: RunConfig
    lines: list[dict[str, Any]]
    journal: list[JournalEntry]
    left_behind: list[str]


def run_marked(mark: str, configs: list[RunConfig]) -> list[Ended]:
    mark_own_children(mark)
    return run_in_turn(configs)


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
    ends = run_distributed(run_marked, 2, mark, [config], timeout_s=900.0)
    assert [ended.error for (ended,) in ends] == [(), ()]
    folder = config.output_dir
    journal = [read_journal(journal_path(folder / "journal", step)) for step in range(1, STEPS + 1)]
    return Outcome(config, read_lines(folder / "metrics.jsonl"), journal, command_lines(mark))


def test_after_every_sync_the_server_has_the_actors_weights(outcome: Outcome) -> None:
    assert [line["policy_version"] for line in outcome.lines] == [0, 1, 2, 3]
    for line in outcome.lines:
        assert line["rollout/canary_mismatch_max"] <= 1e-4
        assert (line["perf/weight_sync_servers"], line["perf/weight_sync_servers_failed"]) == (1, 0)
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


def test_every_batch_is_in_the_journal_and_every_draw_ends_once(outcome: Outcome) -> None:
    rollout = outcome.config.rollout
    for step, entry in enumerate(outcome.journal, start=1):
        assert (entry.step, entry.policy_version, len(entry.groups)) == (step, step - 1, rollout.num_prompts_per_step)
        for group in entry.groups:
            assert [sample.sample_index for sample in group.samples] == list(range(rollout.group_size))
            assert {sample.policy_version for sample in group.samples} == {step - 1}
    settled = [each for entry in outcome.journal for each in entry.settled]
    numbers = [each.number for each in settled]
    assert len(set(numbers)) == len(numbers)
    used = [each for each in settled if each.fate == "used"]
    trained = [group.prompt.id for entry in outcome.journal for group in entry.groups]
    assert sorted(each.prompt_id for each in used) == sorted(trained)


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
