"""Ways to run with a real SGLang server: colocated, by every transport, and ahead of the trainer with every pause mode.

The server is the one that tests share, behind a proxy that notes what it is asked.
"""

import json
import signal
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_fipo.actor.offload import ActorMemory
from megatron_fipo.actor.optimizer import gradient_buffers
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.platform.host_memory import storages_of
from megatron_fipo.rollout.batch import batch_path, build_train_batch, save_batch
from megatron_fipo.rollout.journal import JournalEntry, journal_path, read_journal
from megatron_fipo.rollout.sglang.client import SglangServer, open_session
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.trainer.state import Run
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import prompts, read_lines, run_in_turn, run_to_its_end, small_run, write_inputs
from tests.marked_processes import left_after, mark_own_children
from tests.misbehaving_proxy import MisbehavingProxy, misbehaving
from tests.server_faults import server_lives, signal_all
from tests.sglang_servers import RunningServer, needs_sglang

pytestmark = [pytest.mark.distributed, needs_sglang, pytest.mark.timeout(1200)]

TWO_RANKS = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# What tells of the order of a hand-over; probes and requests come at any time.
COMMANDS = {
    "/pause_generation": "pause",
    "/continue_generation": "continue",
    "/release_memory_occupation": "release",
    "/resume_memory_occupation": "resume",
    "/begin_weight_update": "begin",
    "/update_weights_from_tensor": "tensors",
    "/update_weights_from_disk": "folder",
    "/update_weights_from_distributed": "broadcast",
    "/end_weight_update": "end",
    "/flush_cache": "flush",
    "/update_weight_version": "version",
}


# On the CPU it looks after memory that was handed to a server, and lives as long as that.
LASTING = ("torch_shm_manager",)


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Attributes:
        config: Its configuration.
        lines: Its metrics.
        journal: Its batches.
        asked: What its server was asked, but for requests and questions.
        held: Bytes of the actor that were on the devices while the servers generated, by rank and step.
        left: Processes that it left behind.
    """

    config: RunConfig
    lines: list[dict[str, Any]]
    journal: list[JournalEntry]
    asked: list[str]
    held: list[list[int]]
    left: list[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("modes"))


def described(path: str, body: bytes) -> str:
    """A command in a few words."""
    told = json.loads(body or b"{}")
    return " ".join([COMMANDS[path], *told.get("tags", ()), *([told["mode"]] if "mode" in told else [])])


@contextmanager
def watched(server: RunningServer) -> Iterator[MisbehavingProxy]:
    """A proxy before the server that only looks on; the server has its own weights again afterwards."""
    context: AbstractAsyncContextManager[MisbehavingProxy] = misbehaving(server.url, 0, 0.0, 0)
    proxy = server.run(context.__aenter__())
    try:
        yield proxy
    finally:
        server.run(context.__aexit__(None, None, None))
        server.run(put_back(server, [described(*each) for each in proxy.commands if each[0] in COMMANDS]))


async def put_back(server: RunningServer, asked: Sequence[str]) -> None:
    async with open_session(server.api_key, 4) as session:
        client = SglangServer(server.url, session)
        for tag in ("weights", "kv_cache"):
            # Resuming what was not released ends a server.
            if asked.count(f"release {tag}") > asked.count(f"resume {tag}"):
                await client.resume_memory_occupation([tag], 60.0)
        await client.continue_generation()
        await client.update_weights_from_disk(str(server.model), 60.0)
        await client.flush_cache()


def serve(root: Path, name: str, server: RunningServer, url: str, **changes: Any) -> RunConfig:
    """A configuration that generates with a server that runs already."""
    key_file = root / "key"
    key_file.write_text(server.api_key)
    rollout = {"engine": "sglang", "sglang": SglangConfig(urls=(url,), api_key_file=str(key_file))}
    changes["rollout"] = rollout | changes.get("rollout", {})
    return small_run(
        root,
        name,
        **{"model": {"path": server.model, "dtype": "float32"}, "data": prompts(root), "parallelism": TWO_RANKS}
        | changes,
    )


class NotesMemory:
    """Stands between rollouts and controller, and notes what the actor holds while servers generate.

    As rollout `killed_at` begins, it ends the server.
    """

    def __init__(self, calls: Any, memory: ActorMemory, held: list[int], killed_at: int) -> None:
        self._calls, self._memory, self._held, self._killed_at = calls, memory, held, killed_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)

    def ask(self, action: str, *arguments: Any, **options: Any) -> Any:
        if action == "next_rollout":
            self._held.append(bytes_on_device(self._memory))
            if self._calls.link is not None and len(self._held) == self._killed_at:
                signal_all(server_lives(self._calls.link.process.pid)["server0"], signal.SIGKILL)
        return self._calls.ask(action, *arguments, **options)


def bytes_on_device(memory: ActorMemory) -> int:
    parameters = [parameter for chunk in memory.chunks for parameter in chunk.parameters()]
    assert memory.optimizer is not None
    tensors = [*parameters, *gradient_buffers(memory.chunks), *memory.optimizer.state_tensors()]
    return sum(storage.nbytes() for storage in storages_of(tensors))


def run_watched(mark: str, config: RunConfig, killed_at: int) -> tuple[Any, list[int]]:
    quiet_upstream()
    mark_own_children(mark)
    held: list[int] = []

    def change(run: Run) -> None:
        rollout: Any = run.rollout
        if rollout.colocation is not None:
            rollout.calls = NotesMemory(rollout.calls, rollout.colocation.trainer, held, killed_at)

    return run_to_its_end(config, change).error, held


def outcome_of(
    config: RunConfig, proxy: MisbehavingProxy | None = None, timeout_s: float = 300.0, killed_at: int = 0
) -> Outcome:
    """Run it on two ranks, to its end."""
    mark = uuid.uuid4().hex
    first = 0 if proxy is None else len(proxy.commands)
    ends = run_distributed(run_watched, 2, mark, config, killed_at, timeout_s=timeout_s)
    assert [error for error, _ in ends] == [(), ()]
    folder = config.output_dir
    journal = [read_journal(journal_path(folder / "journal", step)) for step in range(1, config.num_steps + 1)]
    asked = [] if proxy is None else [described(*each) for each in proxy.commands[first:] if each[0] in COMMANDS]
    lines = read_lines(folder / "metrics.jsonl")
    return Outcome(config, lines, journal, asked, [held for _, held in ends], left_after(mark, 30.0, LASTING))


def runs_of(asked: Sequence[str]) -> list[str]:
    """Equal neighbours once."""
    return [each for place, each in enumerate(asked) if place == 0 or asked[place - 1] != each]


def check_syncs(outcome: Outcome, killed_at: int = 0) -> None:
    """Every synchronisation has reached the server, a killed one twice, and every line is sound."""
    steps = outcome.config.num_steps
    assert [line["policy_version"] for line in outcome.lines] == list(range(steps + 1))
    for step, line in enumerate(outcome.lines):
        assert line["rollout/canary_mismatch_max"] <= 1e-4
        assert line["perf/weight_sync_servers"] == (2 if killed_at and step == killed_at else 1)
        assert line["perf/weight_sync_servers_failed"] == 0
        assert not CATALOGUE.undeclared(line)
    for line in outcome.lines[1:]:
        assert line["fipo/null_future_kl_std"] == 0.0
    assert outcome.left == []


def check_journal(outcome: Outcome) -> None:
    """Every batch is whole, and every draw comes to one end."""
    rollout = outcome.config.rollout
    for step, entry in enumerate(outcome.journal, start=1):
        assert (entry.step, entry.policy_version, len(entry.groups)) == (step, step - 1, rollout.num_prompts_per_step)
        for group in entry.groups:
            assert [sample.sample_index for sample in group.samples] == list(range(rollout.group_size))
            versions = np.concatenate([sample.token_versions for sample in group.samples])
            assert step - 1 - rollout.policy_lag <= versions.min() and versions.max() <= step - 1
    numbers = [each.number for entry in outcome.journal for each in entry.settled]
    assert len(set(numbers)) == len(numbers)


def check_replay(root: Path, outcome: Outcome) -> None:
    """Training on the journalled batches, with nothing that generates, gives the same updates bit by bit."""
    config = outcome.config
    recorded = root / f"{config.output_dir.name}_recorded"
    for entry in outcome.journal:
        batch = build_train_batch(entry.groups, config.algorithm, config.rollout.temperature)
        save_batch(batch, batch_path(recorded, entry.step))
    replay = replace(
        config,
        output_dir=root / f"{config.output_dir.name}_replay",
        mode="train_only",
        recorded_rollouts=recorded,
        data=None,
    )
    ends = run_distributed(run_in_turn, 2, [replay], timeout_s=300.0)
    assert [ended.error for (ended,) in ends] == [(), ()]
    again = read_lines(replay.output_dir / "metrics.jsonl")
    of_lags = [f"train/mismatch_mean_abs_from_lag_{lag}" for lag in (0, 1)]
    for key in ("train/loss_by_update", "train/grad_norm_by_update", "train/entropy", *of_lags):
        assert [line.get(key) for line in again[1:]] == [line.get(key) for line in outcome.lines[1:]]
    weights, others = (load_file(each.output_dir / "export" / "model.safetensors") for each in (config, replay))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def check_hand_over(outcome: Outcome) -> None:
    """The devices change hands in the one order that never needs more than they have."""
    to_servers = ["resume weights", "begin", "tensors", "end", "flush", "version", "resume kv_cache", "continue"]
    to_trainer = ["pause abort", "release kv_cache", "release weights"]
    # A sync pauses servers that stand still already; the weights' export takes the devices after the last one.
    expected = [*to_trainer, *to_servers] + [*to_trainer, "pause abort", *to_servers] * outcome.config.num_steps
    assert runs_of(outcome.asked) == [*expected, *to_trainer]
    for held in outcome.held:
        assert held == [0] * outcome.config.num_steps
    for line in outcome.lines:
        assert line["perf/offload_gib"] > 0 and line["perf/offload_s"] > 0


def test_a_colocated_run_hands_the_devices_over(root: Path, sglang_server: RunningServer) -> None:
    with watched(sglang_server) as proxy:
        config = serve(root, "colocated", sglang_server, proxy.url, num_steps=2, rollout={"colocated": True})
        outcome = outcome_of(config, proxy)
    check_syncs(outcome)
    check_journal(outcome)
    check_hand_over(outcome)
    check_replay(root, outcome)


@pytest.mark.exhaustive
def test_a_colocated_run_has_servers_of_its_own(root: Path) -> None:
    """They start on devices that the trainer has left, get weights when they come back, and end with the run."""
    small = SglangConfig(server_arguments={"max_total_tokens": 4096, "max_running_requests": 32})
    rollout = {"engine": "sglang", "colocated": True, "sglang": small}
    data = prompts(root, held_out="held_out")
    config = small_run(root, "own_servers", num_steps=3, data=data, parallelism=TWO_RANKS, rollout=rollout)
    outcome = outcome_of(config, timeout_s=900.0, killed_at=2)
    check_syncs(outcome, killed_at=2)
    check_journal(outcome)
    assert outcome.held == [[0, 0, 0], [0, 0, 0]]
    check_replay(root, outcome)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("transport", "sent"), [("tensor", ["begin", "tensors", "end"]), ("disk", ["folder"])], ids=["tensor", "disk"]
)
def test_a_run_sends_weights_by_other_transports(
    root: Path, sglang_server: RunningServer, transport: Any, sent: list[str]
) -> None:
    with watched(sglang_server) as proxy:
        sync = WeightSyncConfig(transport=transport)
        outcome = outcome_of(serve(root, transport, sglang_server, proxy.url, weight_sync=sync), proxy)
    check_syncs(outcome)
    check_journal(outcome)
    assert runs_of(outcome.asked) == ["pause retract", *sent, "flush", "version", "continue"] * 2
    # One version of the weights is left.
    assert len(list((outcome.config.output_dir / "weights").glob("*"))) == (transport == "disk")


@dataclass(frozen=True)
class Ahead:
    """How a run ahead of its trainer treats the requests that a synchronisation meets.

    Attributes:
        pause: The pause mode.
        partial: Whether interrupted responses go on from their tokens.
        mixes: Whether a response may have tokens of two versions.
        is_exact: Whether tokens of the newest weights have been computed with these alone.
        colocated: Whether servers and trainer have the devices in turn.
    """

    pause: Any
    partial: bool
    mixes: bool
    is_exact: bool
    colocated: bool = False


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(Ahead("abort", False, False, True), id="abort"),
        pytest.param(Ahead("abort", True, True, True), id="partial"),
        pytest.param(Ahead("abort", True, True, True, colocated=True), id="colocated"),
        pytest.param(Ahead("retract", False, True, True), id="retract"),
        pytest.param(Ahead("in_place", False, True, False), id="in_place"),
    ],
)
def test_a_run_ahead_of_its_trainer(root: Path, sglang_server: RunningServer, way: Ahead) -> None:
    name = f"ahead_{way.pause}_{way.partial}_{way.colocated}"
    ahead = {"policy_lag": 1, "partial_rollouts": way.partial, "colocated": way.colocated, "max_response_tokens": 200}
    with watched(sglang_server) as proxy:
        config = serve(
            root,
            name,
            sglang_server,
            proxy.url,
            num_steps=4,
            rollout=ahead,
            parallelism=TWO_RANKS | {"max_tokens_per_micro_batch": 256},
            weight_sync=WeightSyncConfig(pause=way.pause),
        )
        outcome = outcome_of(config, proxy)
    check_syncs(outcome)
    check_journal(outcome)
    check_versions(outcome, way)
    check_replay(root, outcome)


def check_versions(outcome: Outcome, way: Ahead) -> None:
    """Each token has the version of the weights that gave it, and lies as far from the trainer as that says."""
    samples = [sample for entry in outcome.journal for group in entry.groups for sample in group.samples]
    assert all(np.all(np.diff(sample.token_versions) >= 0) for sample in samples)
    num_mixed = sum(sample.token_versions[0] != sample.token_versions[-1] for sample in samples)
    assert (num_mixed > 0) == way.mixes
    steps = outcome.lines[1:]
    assert (sum(line["rollout/requests_interrupted"] for line in steps) > 0) == (way.pause == "abort")
    if way.pause == "abort":
        assert (sum(line["rollout/response_tokens_discarded"] for line in steps) == 0) == way.partial
    of_lag = [[line.get(f"train/mismatch_mean_abs_from_lag_{lag}") for line in steps] for lag in (0, 1)]
    newest, older = ([each for each in values if each is not None] for values in of_lag)
    assert newest and older and min(older) > 1e-4
    assert (max(newest) < 1e-5) == way.is_exact
    for entry, line in zip(outcome.journal, steps, strict=True):
        versions = np.concatenate([sample.token_versions for group in entry.groups for sample in group.samples])
        assert line["rollout/token_staleness_mean"] == pytest.approx(entry.policy_version - versions.mean())
