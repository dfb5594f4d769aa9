"""Faults planted in real runs: seen on the step they are planted in, obeyed on all ranks alike, and run again."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.load import load_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.safeguards import SafeguardsConfig
from megatron_fipo.data.routing_file import write_routing_file
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.rollout.batch import batch_path, load_batch, routing_path, save_batch
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.trainer.dumps import read_dump
from megatron_fipo.trainer.replay import Replay, open_dump, replay
from megatron_fipo.trainer.state import Run
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import Ended, read_lines, run_to_its_end, small_run
from tests.recorded_batches import record_batch
from tests.tiny_actors import bits
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

UPDATES = 3
# The drop and the dual clip act on updates of this size.
FIPO = FipoConfig.preset(
    "official-7b", aggregation="token_mean", dual_clip=1.05, safety_threshold=1.02, updates_per_rollout=UPDATES
)
PP = {"pipeline_model_parallel_size": 2}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP = {"context_parallel_size": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("safeguards")
    write_tiny_model(root / "model", num_hidden_layers=2)
    path = record_batch(root / "model", root / "rollouts", FIPO, num_groups=6, max_tokens=24)
    batch = load_batch(path)
    save_batch(batch, batch_path(root / "rollouts", 2))
    fallen = (batch.rewards / 2).astype(np.float32)
    save_batch(replace(batch, rewards=fallen), batch_path(root / "rollouts", 3))
    write_tiny_model(root / "moe", "qwen3_moe", num_hidden_layers=2)
    draws = np.random.default_rng(3)
    choices = [
        draws.random((length - 1, 2, 4)).argsort(axis=-1)[..., :2].astype(np.int16) for length in batch.sequence_lengths
    ]
    write_routing_file(routing_path(path), batch.sequence_lengths, choices)
    return root


Plant = Callable[[Run, int, Sequence[MicroBatch]], None]


@dataclass(frozen=True)
class Case:
    """A run with a fault.

    Attributes:
        plant: Called before every update with its number in the run, from 1.
        safeguards: Fields of the section.
        changes: Fields of the run.
        dump: Step whose dump is run again afterwards.
        overrides: Words with which it is run a second time.
    """

    plant: Plant = lambda *_: None
    safeguards: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    dump: int | None = None
    overrides: Sequence[str] = ()


@dataclass
class Seen:
    """How a run with a fault went on one rank.

    Attributes:
        ended: How it ended.
        changed: For every update, whether weights, optimizer or schedule were changed by it.
        again: What came of running its dump again.
        elsewhere: The same with the overrides.
    """

    ended: Ended
    changed: list[bool] = field(default_factory=list)
    again: Replay | None = None
    elsewhere: Replay | None = None


def spoil(name: str, value: float, update: int, rank: int | None = None) -> Plant:
    """Put a number into a field of an update's first response tokens."""

    def plant(run: Run, number: int, mini_batch: Sequence[MicroBatch]) -> None:
        values = getattr(mini_batch[0], name)
        if number == update and rank in (None, run.context.rank) and values is not None:
            values[mini_batch[0].response_positions[2:5]] = value

    return plant


def spoil_two(update: int) -> Plant:
    """Spoil an update and the next one."""

    def plant(run: Run, number: int, mini_batch: Sequence[MicroBatch]) -> None:
        spoil("advantages", math.nan, number if number in (update, update + 1) else 0)(run, number, mini_batch)

    return plant


def break_weight(update: int, rank: int | None = None) -> Plant:
    """Make a weight infinite when the optimizer has made its step in an update."""

    def plant(run: Run, number: int, mini_batch: Sequence[MicroBatch]) -> None:
        assert run.actor.train_step is not None
        optimizer = run.actor.train_step.optimizer
        if number == update and rank in (None, run.context.rank):
            step = optimizer.step

            def breaking(apply: bool = True) -> Any:
                outcome = step(apply)
                optimizer.step = step  # type: ignore[method-assign]
                next(iter(run.actor.chunks[-1].parameters())).data.view(-1)[7] = math.inf
                return outcome

            optimizer.step = breaking  # type: ignore[method-assign]

    return plant


def break_gradient(update: int) -> Plant:
    """Make a gradient NaN in one backward pass of one rank, as failing hardware might."""

    def plant(run: Run, number: int, mini_batch: Sequence[MicroBatch]) -> None:
        if number == update and run.context.rank == 1:
            weight = run.actor.chunks[-1].module.decoder.layers[-1].mlp.linear_fc2.weight
            handle = weight.register_hook(lambda gradient: handle.remove() or gradient * math.nan)

    return plant


def block_dumps(run: Run, number: int, mini_batch: Sequence[MicroBatch]) -> None:
    """Spoil the first update where nothing can be kept of it: as root, no permission is missing."""
    if number == 1 and run.directory is not None:
        run.directory.dumps.write_text("in the way")
    spoil("advantages", math.nan, 1)(run, number, mini_batch)


def noise(size: float) -> Plant:
    """Shift old log-probabilities, as kernels that differ between the two passes would."""

    def plant(run: Run, number: int, mini_batch: Sequence[MicroBatch]) -> None:
        generator = torch.Generator().manual_seed(number)
        for each in mini_batch:
            if each.old_log_probs is not None:
                each.old_log_probs += size * torch.randn(each.old_log_probs.shape, generator=generator)

    return plant


def run_case(root: Path, name: str, case: Case) -> Seen:
    config = small_run(
        root,
        name,
        **{
            "mode": "train_only",
            "data": None,
            "recorded_rollouts": root / "rollouts",
            "num_steps": 1,
            "algorithm": FIPO,
            "checkpoint": {"export_at_end": False, "every_steps": 0, "export_dtype": "bfloat16"},
            "metrics": {"samples_per_step": 0},
            "safeguards": SafeguardsConfig(**case.safeguards),
            **case.changes,
            "parallelism": {"max_tokens_per_micro_batch": 64} | case.changes.get("parallelism", {}),
            "model": {"path": root / ("moe" if name == "experts" else "model"), "dtype": "float32"}
            | case.changes.get("model", {}),
        },
    )
    seen = Seen(Ended())

    def change(run: Run) -> None:
        train_step = run.actor.train_step
        assert train_step is not None
        update, numbers = train_step.update, iter(range(1, 1000))

        def watched(mini_batch: Sequence[MicroBatch], *arguments: Any) -> Any:
            case.plant(run, next(numbers), mini_batch)
            before = state(run)
            result = update(mini_batch, *arguments)
            seen.changed.append(state(run) != before)
            return result

        train_step.update = watched  # type: ignore[method-assign]

    seen.ended = run_to_its_end(config, change)
    if case.dump is not None:
        seen.again = run_again(config.output_dir, case.dump)
        if case.overrides:
            seen.elsewhere = run_again(config.output_dir, case.dump, case.overrides)
    return seen


def state(run: Run) -> list[bytes]:
    """All of this rank that an update may change."""
    assert run.actor.train_step is not None
    optimizer = run.actor.train_step.optimizer
    tensors = [*(each for chunk in run.actor.chunks for each in chunk.parameters()), *optimizer.state_tensors()]
    told = (optimizer.num_steps, optimizer.schedule.num_steps, optimizer.learning_rate)
    return [*(bits(each).numpy().tobytes() for each in tensors), repr(told).encode()]


def run_again(folder: Path, step: int, overrides: Sequence[str] = ()) -> Replay:
    dump, config = open_dump(folder / "dumps" / f"step_{step}", overrides)
    return replace(replay(dump, config), batch=None)


def run_cases(root: Path, cases: dict[str, Case]) -> dict[str, Seen]:
    torch.use_deterministic_algorithms(True)
    quiet_upstream()
    return {name: run_case(root, name, case) for name, case in cases.items()}


def kept(root: Path, name: str) -> list[str]:
    return sorted(path.name for path in (root / name).glob("dumps/*"))


TWO_STEPS = {"num_steps": 2}
LARGE_STEPS = {"optimizer": {"learning_rate": 3.0, "warmup_steps": 0, "adam_eps": 1e-4}}
RATIOS = {"max_log_ratio": 0.5}
SKIP = {"on_non_finite": "skip"}
BF16 = {"parallelism": CP, "model": {"dtype": "bfloat16"}}
SIDEWAYS = ["--parallelism.tensor_model_parallel_size", "2"]
ON_TWO_RANKS: dict[str, Case] = {
    # The second update of the second step; of two replicas one has the NaN.
    "loss": Case(spoil("advantages", math.nan, 5, rank=1), changes=TWO_STEPS, dump=2),
    "loss_skipped": Case(spoil("advantages", math.nan, 2, rank=0), SKIP, dump=1),
    # Its peer in the tensor-parallel group sees nothing wrong.
    "loss_of_a_rank": Case(spoil("advantages", math.nan, 2, rank=0), SKIP, {"parallelism": TP}, dump=1),
    "loss_pp": Case(spoil("old_log_probs", math.nan, 2), changes={"parallelism": PP}, dump=1),
    "gradient_tp": Case(spoil("advantages", 3e38, 2), changes={"parallelism": TP}, dump=1),
    "gradient_pp": Case(break_gradient(1), {"max_dumps": 0}, {"parallelism": PP}),
    "gradient_cp": Case(spoil("advantages", 3e38, 2), SKIP, BF16, 1),
    "gradient_of_a_rank": Case(break_gradient(3), SKIP, dump=1),
    "weights": Case(break_weight(UPDATES)),
    "weights_between": Case(break_weight(1), SKIP, dump=1),
    "weights_of_a_rank": Case(break_weight(1, rank=1), dump=1),
    "warned": Case(noise(0.1), RATIOS, LARGE_STEPS | TWO_STEPS),
    "ratio_skipped": Case(
        safeguards=RATIOS | {"on_exploding_ratio": "skip", "max_dumps": 1}, changes=LARGE_STEPS | TWO_STEPS, dump=1
    ),
    "ratio_stopped": Case(
        safeguards=RATIOS | {"on_exploding_ratio": "stop", "dump_weights": False}, changes=LARGE_STEPS
    ),
    "noise_skipped": Case(
        noise(0.1), {"on_null_noise": "skip", "max_consecutive_skips": 4}, {"parallelism": CP} | TWO_STEPS, 1
    ),
    "undumpable": Case(block_dumps, SKIP),
    "collapse": Case(
        safeguards={"collapse_window_steps": 1, "max_reward_drop": 0.2, "on_collapse": "stop"}, changes={"num_steps": 3}
    ),
    "asked_for": Case(
        safeguards={"dump_step": 1, "dump_update": 3},
        changes={
            "algorithm": replace(FIPO, reference_kl_coefficient=0.01),
            "optimizer": {"learning_rate": 4e-3, "warmup_steps": 0, "adam_eps": 1e-4},
        },
        dump=1,
        overrides=SIDEWAYS,
    ),
    "asked_for_after_a_fault": Case(spoil_two(2), SKIP | {"dump_step": 1, "dump_update": 3}),
    "fault_after_asked_for": Case(
        spoil("advantages", math.nan, 2), SKIP | {"dump_step": 1, "dump_update": 1}, {"parallelism": TP}
    ),
    "experts": Case(
        safeguards={"dump_step": 1, "dump_update": 2},
        changes={
            "rollout": {"replay_routing": True, "engine": "sglang"},
            "parallelism": TP | {"expert_model_parallel_size": 2},
        },
        dump=1,
        overrides=["--parallelism", "{pipeline_model_parallel_size: 2}"],
    ),
}


@pytest.fixture(scope="module")
def seen(root: Path) -> dict[str, list[Seen]]:
    """Every case on both ranks."""
    ranks = run_distributed(run_cases, 2, root, ON_TWO_RANKS)
    return {name: [rank[name] for rank in ranks] for name in ON_TWO_RANKS}


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    return read_lines(root / name / "metrics.jsonl")[1:]


def test_all_ranks_see_and_decide_alike(seen: dict[str, list[Seen]]) -> None:
    for name, (first, second) in seen.items():
        assert first.ended.error == second.ended.error, name
        assert first.changed == second.changed, name
        assert second.ended.log == [], name


# Case, and for every update whether it is applied; the run ends with the last of them.
APPLIED = {
    "loss": [True, True, True, True, False],
    "loss_skipped": [True, False, True],
    "loss_of_a_rank": [True, False, True],
    "loss_pp": [True, False],
    "gradient_tp": [True, False],
    "gradient_pp": [False],
    "gradient_cp": [True, False, True],
    "gradient_of_a_rank": [True, True, False],
    "weights": [True, True, True],
    "weights_between": [True, False],
    "weights_of_a_rank": [True, False],
    "warned": [True] * 6,
    "ratio_skipped": [True, False, False] * 2,
    "ratio_stopped": [True, False],
    "noise_skipped": [False] * 5,
    "undumpable": [False, True, True],
    "collapse": [True] * 6,
    "asked_for": [True] * 3,
    "asked_for_after_a_fault": [True, False, False],
    "fault_after_asked_for": [True, False, True],
    "experts": [True] * 3,
}


@pytest.mark.parametrize("name", APPLIED)
def test_an_update_is_applied_as_a_whole_or_leaves_no_trace(name: str, seen: dict[str, list[Seen]]) -> None:
    assert seen[name][0].changed == APPLIED[name]


WEIGHT = r"embedding\.word_embeddings\.weight"
NOT_MADE = r"; the update was not applied"
ERRORS = {
    "loss": (
        r"NonFiniteError: step 2, update 2 of 3: the loss is nan, first in micro-batch 0 of rank 1 \(sequences \[.*\] "
        r"of the rollout batch\), token 2 of the response of sequence \d+: advantages is nan" + NOT_MADE + "; "
        r"it is kept in \S+/loss/dumps/step_2"
    ),
    "loss_pp": r"NonFiniteError: step 1, update 2 of 3: the loss is nan, .*: old_log_probs is nan" + NOT_MADE + "; .*",
    "gradient_tp": (
        r"NonFiniteError: step 1, update 2 of 3: the gradient norm is nan, the loss is finite; not finite in "
        rf"{WEIGHT} \(rank 0, 1\), decoder\.layers\.0\.\S+ .* and \d+ more{NOT_MADE}; .*"
    ),
    # Layers have the numbers of the whole model on every stage.
    "gradient_pp": (
        r"NonFiniteError: step 1, update 1 of 3: the gradient norm is nan, the loss is finite; not finite in "
        rf"decoder\.layers\.1\.mlp\.linear_fc2\.weight \(rank 1\){NOT_MADE}"
    ),
    "weights": (
        r"NonFiniteError: step 1, update 3 of 3: after its optimizer step weights are not finite: "
        rf"{WEIGHT} \(rank 0, 1\); it is kept in \S+\. Go on from a checkpoint"
    ),
    "weights_between": (
        r"NonFiniteError: step 1, update 2 of 3: the loss is nan, .*: log_probs is nan\. The weights were not finite "
        rf"before it: {WEIGHT} \(rank 0, 1\){NOT_MADE}; .*"
    ),
    "weights_of_a_rank": rf"NonFiniteError: .*\. The weights were not finite before it: {WEIGHT} \(rank 1\); .*",
    "ratio_stopped": (
        r"SafeguardError: step 1, update 2 of 3: a token's log-ratio is 20\.000 \(safeguards\.max_log_ratio = 0\.5\)"
        + NOT_MADE
        + "; .*"
    ),
    "noise_skipped": (
        r"SafeguardError: step 2, update 2 of 3: std\(F\) = 0\.\d+ before the first applied update, .*"
        + NOT_MADE
        + r"\. "
        r"It is faulty update 5 in a row, and safeguards\.max_consecutive_skips = 4"
    ),
    "collapse": r"SafeguardError: step 3: the mean reward of 1 steps, 0\.250, lies 0\.250 below the best of .*",
}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_the_run_ends_where_its_policy_says_so(name: str, seen: dict[str, list[Seen]]) -> None:
    found = ": ".join(seen[name][0].ended.error)
    assert re.fullmatch(ERRORS.get(name, ""), found), found


def test_what_is_skipped_or_warned_of_is_told_and_counted(root: Path, seen: dict[str, list[Seen]]) -> None:
    def told(name: str) -> list[str]:
        return [text.split(": ")[0] for text in seen[name][0].ended.log]

    assert told("loss_skipped") == ["step 1, update 2 of 3"]
    assert told("ratio_skipped") == [f"step {step}, update {update} of 3" for step in (1, 2) for update in (2, 3)]
    # Noise on the first update of each step, and ratios on the others.
    assert told("warned") == [f"step {step}, update {update} of 3" for step in (1, 2) for update in (1, 2, 3)]
    counts = {
        ("loss_skipped", "train/faults_non_finite"): [1],
        ("loss_skipped", "train/updates_skipped"): [1],
        ("loss_skipped", "train/consecutive_skips"): [0],
        ("gradient_of_a_rank", "train/consecutive_skips"): [1],
        ("warned", "train/faults_exploding_ratio"): [2, 2],
        ("warned", "train/faults_null_noise"): [1, 1],
        ("warned", "train/updates_skipped"): [0, 0],
        ("ratio_skipped", "train/updates_skipped"): [2, 2],
        ("noise_skipped", "train/faults_null_noise"): [3],
        ("collapse", "rollout/reward_drop"): [0, 0],
    }
    assert {key: [line[key[1]] for line in lines(root, key[0])] for key in counts} == counts
    assert min(line["train/log_ratio_abs_max"] for line in lines(root, "warned")) > 0.5
    assert not CATALOGUE.undeclared(lines(root, "loss_skipped")[0])


def test_a_fault_that_cannot_be_kept_is_still_a_fault(root: Path, seen: dict[str, list[Seen]]) -> None:
    first, second = seen["undumpable"][0].ended.log
    assert re.fullmatch(r"no dump of step 1: \S+/dumps\S*: cannot be read \(.*\); mend its permissions, .*", first)
    assert second.endswith("the update was not applied")


def test_what_is_kept_is_whole_and_the_first_of_a_step(root: Path, seen: dict[str, list[Seen]]) -> None:
    assert kept(root, "loss") == ["step_2"]
    assert kept(root, "noise_skipped") == ["step_1", "step_2"]
    assert kept(root, "ratio_skipped") == ["step_1"], "max_dumps"
    assert kept(root, "warned") == []
    assert kept(root, "asked_for_after_a_fault") == ["step_1"], "nothing half written is left"
    for name, update, fault in (
        ("asked_for_after_a_fault", 2, "non-finite"),
        ("fault_after_asked_for", 1, ""),
        ("noise_skipped", 1, "null noise"),
        ("ratio_skipped", 2, "exploding ratio"),
        ("gradient_cp", 2, "non-finite"),
    ):
        dump = read_dump(root / name / "dumps" / "step_1")
        dump.check_bytes()
        assert (dump.place.update, dump.fault.kind, dump.weights) == (update, fault, "before")
        assert {f"rank_{rank}.npz" for rank in (0, 1)} < dump.checkpoint.manifest.files.keys()
        assert load_config(RunConfig, dump.path / "config.yaml").output_dir == root / name


SAME = [name for name, case in ON_TWO_RANKS.items() if case.dump and not name.endswith("_of_a_rank")]


@pytest.mark.parametrize("name", SAME)
def test_an_update_that_is_run_again_is_the_same_bit_by_bit(name: str, seen: dict[str, list[Seen]]) -> None:
    for rank in seen[name]:
        assert rank.again is not None and rank.again.is_same_cut and rank.again.is_same
        assert all(each.is_same for each in rank.again.numbers) and len(rank.again.numbers) > 40
        assert sum(each.differing for each in rank.again.packs) == 0
    again = seen[name][0].again
    assert again is not None and len(again.tokens) == 10
    assert again.changes == []
    assert math.isfinite(again.dump.result.loss) == ("loss" not in name and "weights" not in name)
    assert again.bad_gradients == ([0] if "gradient" in name else [])


def test_decisions_on_tokens_are_among_what_is_the_same(seen: dict[str, list[Seen]]) -> None:
    again = seen["asked_for"][0].again
    assert again is not None
    assert sum(each.dropped for each in again.packs) == again.dump.result.metrics["fipo/dropped_sequences"] > 0
    assert sum(each.dual_clipped for each in again.packs) > 0
    assert {each["kept"] for each in again.tokens} == {True, False}


def test_a_fault_of_one_machine_does_not_come_again(seen: dict[str, list[Seen]]) -> None:
    again = seen["gradient_of_a_rank"][0].again
    assert again is not None and again.is_same_cut
    assert [(each.name, math.isfinite(each.now)) for each in again.numbers if not each.is_same] == [
        ("gradient norm", True)
    ]
    # A dump has the weights of one replica, and the other one's had gone bad.
    again = seen["weights_of_a_rank"][0].again
    assert again is not None and not again.is_same
    assert math.isfinite(again.numbers[0].now)
    assert [each.differing > 0 for each in again.packs] == [each.rank == 1 for each in again.packs]


@pytest.mark.parametrize("name", ["asked_for", "experts"])
def test_in_another_grid_it_is_the_same_to_rounding(name: str, seen: dict[str, list[Seen]]) -> None:
    elsewhere = seen[name][0].elsewhere
    assert elsewhere is not None and not elsewhere.is_same_cut
    assert elsewhere.is_same, [each for each in elsewhere.numbers if not each.is_same]
    assert [each.field for each in elsewhere.changes if each.now == 2]
    assert max(each.difference for each in elsewhere.packs) < 1e-4


def replay_alone(root: Path) -> tuple[bool, bool, float]:
    torch.use_deterministic_algorithms(True)
    quiet_upstream()
    outcome = run_again(root / "loss", 2)
    return outcome.is_same, outcome.is_same_cut, outcome.numbers[0].now


def test_two_ranks_update_is_run_again_on_one(root: Path, seen: dict[str, list[Seen]]) -> None:
    ((is_same, is_same_cut, loss),) = run_distributed(replay_alone, 1, root)
    assert is_same and not is_same_cut
    assert math.isnan(loss)


@pytest.mark.parametrize(("name", "rule"), [("weights", "its step had damaged"), ("ratio_stopped", "dump_weights")])
def test_a_dump_without_the_weights_from_before_is_refused(
    name: str, rule: str, root: Path, seen: dict[str, list[Seen]]
) -> None:
    with pytest.raises(ConfigError, match=f"must hold the weights from before the update, and does not; .*{rule}"):
        open_dump(root / name / "dumps" / "step_1", [])


GRIDS: dict[str, dict[str, Any]] = {
    "TP 2 + SP × PP 2": TP | PP,
    "PP 2 × VPP 2 × DP 2": PP | {"virtual_pipeline_model_parallel_size": 2},
    "CP 2 × DP 2": CP,
    "TP 2 + SP × CP 2": TP | CP,
}


def asked_for_on_grids(root: Path) -> dict[str, list[bool]]:
    """Whether what is kept on each grid is the same in that grid, and on the next one."""
    torch.use_deterministic_algorithms(True)
    quiet_upstream()
    if dist.get_rank() == 0:
        # Four layers, for stages of stages.
        write_tiny_model(root / "deep")
    dist.barrier()
    found = {}
    grids = list(GRIDS.items())
    for number, (name, grid) in enumerate(grids):
        folder = f"grid_{number}"
        case = Case(
            safeguards={"dump_step": 1, "dump_update": 3},
            changes={"parallelism": grid, "model": {"path": root / "deep"}},
        )
        run_case(root, folder, case)
        here = run_again(root / folder, 1)
        after = grids[(number + 1) % len(grids)][1] | {"max_tokens_per_micro_batch": 96}
        there = run_again(root / folder, 1, ["--parallelism", json.dumps(after)])
        found[name] = [here.is_same_cut, here.is_same, there.is_same_cut, there.is_same]
    return found


@pytest.mark.exhaustive
def test_what_is_kept_on_four_ranks_is_the_same_there_and_elsewhere(root: Path) -> None:
    for rank in run_distributed(asked_for_on_grids, 4, root):
        assert rank == dict.fromkeys(GRIDS, [True, True, False, True])
