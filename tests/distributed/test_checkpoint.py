"""Checkpoints of the actor: the same bits in the same process grid, the same next update in any other."""

import itertools
import random
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.actor.checkpoint import ActorCheckpoint
from megatron_fipo.actor.checkpoint_writer import StagedWriter
from megatron_fipo.actor.offload import ActorMemory
from megatron_fipo.actor.random_states import pack_random_states
from megatron_fipo.actor.train_step import UpdateResult
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.runtime.errors import CheckpointError
from tests.checkpoint_tensors import checkpoint_tensors
from tests.distributed_helpers import run_distributed
from tests.invariance.grid import QUICK_LEVELS, Combination, structures
from tests.invariance.updates import SEEDS, ragged_batch, write_models
from tests.tiny_actors import bits
from tests.trainees import make, save, trainee

pytestmark = pytest.mark.distributed

SINGLE = Combination()
MOE = Combination(model="moe")
SHARDED = {"distributed_optimizer": True}

# Each is loaded by the next one, and saved by it without an update in between.
CHAINS: dict[str, list[Combination]] = {
    "dense": [
        SINGLE,
        replace(SINGLE, tensor=(2, True), data=2, **SHARDED),
        replace(SINGLE, pipeline=(2, 2), context=2, **SHARDED),
        replace(SINGLE, data=2, **SHARDED),
        replace(SINGLE, tensor=(2, False)),
    ],
    "moe": [
        MOE,
        replace(MOE, tensor=(2, True), data=2, expert=2, expert_tensor=2, **SHARDED),
        replace(MOE, context=2, data=2, expert=2, **SHARDED),
        replace(MOE, data=2, expert=2, **SHARDED),
        replace(MOE, pipeline=(2, 1)),
    ],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write_models(root)
    return root


def walk(root: Path, links: Sequence[tuple[Combination, str, str]]) -> list[UpdateResult]:
    """Load each link's checkpoint (or take the first update), save again, and take the second update."""
    results = []
    for combination, source, target in links:
        with trainee(root, combination) as each:
            if source:
                each.checkpoint.load(root / source)
            else:
                each.train_step.update(each.updates[0])
            save(each, root / target)
            size = sum(path.stat().st_size for path in (root / target).iterdir())
            assert 0.7 < size / each.checkpoint.num_bytes <= 1, "the estimate must suffice"
            results.append(each.train_step.update(each.updates[1]))
    return results


@pytest.fixture(scope="module")
def walks(root: Path) -> dict[str, list[UpdateResult]]:
    """The second update of every link of both chains, which run side by side on the ranks of each length."""
    results: dict[str, list[UpdateResult]] = {model: [] for model in CHAINS}
    places = dict.fromkeys(CHAINS, 0)
    while any(places[model] < len(CHAINS[model]) for model in CHAINS):
        world_size = next(CHAINS[model][place].world_size for model, place in places.items())
        links: list[tuple[str, tuple[Combination, str, str]]] = []
        for model, chain in CHAINS.items():
            while places[model] < len(chain) and chain[places[model]].world_size == world_size:
                place = places[model]
                source = f"{model}_{place - 1}" if place else ""
                links.append((model, (chain[place], source, f"{model}_{place}")))
                places[model] += 1
        outcomes = run_distributed(walk, world_size, root, [link for _, link in links])[0]
        for (model, _), outcome in zip(links, outcomes, strict=True):
            results[model].append(outcome)
    return results


@pytest.mark.parametrize(("model", "place"), [(model, place) for model in CHAINS for place in range(1, 5)])
def test_another_grid_takes_the_same_next_step(
    root: Path, walks: dict[str, list[UpdateResult]], model: str, place: int
) -> None:
    first, other = walks[model][0], walks[model][place]
    scale = float(np.abs(ragged_batch(SEEDS[model]).advantages).mean())
    print(f"{CHAINS[model][place]}: loss {abs(other.loss - first.loss) / scale:.1e} · mean|A|")
    assert other.applied and other.learning_rate == first.learning_rate
    assert abs(other.loss - first.loss) <= 1e-6 * scale
    assert other.grad_norm == pytest.approx(first.grad_norm, rel=1e-6)


@pytest.mark.parametrize("model", list(CHAINS))
def test_what_is_saved_does_not_depend_on_the_grid(
    root: Path, walks: dict[str, list[UpdateResult]], model: str
) -> None:
    first = checkpoint_tensors(root / f"{model}_0")
    assert sum(name.startswith("optimizer.state.") for name in first) == 2 * len(first) / 3
    for place in range(1, len(CHAINS[model])):
        other = checkpoint_tensors(root / f"{model}_{place}")
        assert other.keys() == first.keys(), CHAINS[model][place]
        for name, tensor in first.items():
            assert torch.equal(bits(tensor), bits(other[name])), f"{CHAINS[model][place]}: {name}"


def save_again(root: Path, combinations: Sequence[Combination]) -> list[str]:
    """Load the chains' first checkpoints in other grids and save them; every way in which these differ."""
    faults = []
    for number, combination in enumerate(combinations):
        folder = root / f"again_{dist.get_world_size()}_{number}"
        with trainee(root, combination) as each:
            each.checkpoint.load(root / f"{combination.model}_0")
            save(each, folder)
        if dist.get_rank() == 0:
            first, other = checkpoint_tensors(root / f"{combination.model}_0"), checkpoint_tensors(folder)
            if first.keys() != other.keys():
                faults.append(f"{combination}: names")
            faults += [
                f"{combination}: {name}"
                for name in first.keys() & other.keys()
                if not torch.equal(bits(first[name]), bits(other[name]))
            ]
            shutil.rmtree(folder)
    return faults


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_grid_reads_and_writes_the_same(root: Path, walks: dict[str, list[UpdateResult]]) -> None:
    combinations = [each for each in structures(QUICK_LEVELS) if each.world_size <= 4]
    for world_size in sorted({each.world_size for each in combinations}):
        here = [each for each in combinations if each.world_size == world_size]
        for batch in itertools.batched(here, 12):
            assert run_distributed(save_again, world_size, root, batch)[0] == []


GRIDS = [
    (replace(SINGLE, tensor=(2, True), data=2, **SHARDED), "float32"),
    (replace(SINGLE, pipeline=(2, 2), data=2), "float32"),
    (replace(SINGLE, data=4, **SHARDED), "bfloat16"),
    (replace(MOE, data=4, expert=2, **SHARDED), "float32"),
]


def resume(root: Path) -> list[str]:
    """Every way in which a resumed actor differs from the one that went on."""
    faults = []
    for number, (combination, dtype) in enumerate(GRIDS):
        folder = root / f"resumed_{number}"
        with trainee(root, combination, dtype) as each:
            each.train_step.update(each.updates[0])
            torch.rand(7 + dist.get_rank()), np.random.rand(3), random.gauss(0, 1)
            save(each, folder)
            wanted = [each.state(), pack_random_states()]
            losses = [each.train_step.update(update).loss for update in each.updates[1:]]
            end = each.state()
        with trainee(root, combination, dtype) as each:
            each.checkpoint.load(folder)
            if [each.state()] != wanted[:1]:
                faults.append(f"{combination} {dtype}: state")
            if not torch.equal(pack_random_states(), wanted[1]):
                faults.append(f"{combination} {dtype}: random states")
            if [each.train_step.update(update).loss for update in each.updates[1:]] != losses:
                faults.append(f"{combination} {dtype}: losses of the next updates")
            if each.state() != end:
                faults.append(f"{combination} {dtype}: state after them")
    return faults


def test_the_same_grid_goes_on_bit_by_bit(root: Path) -> None:
    assert run_distributed(resume, 4, root) == [[]] * 4


def save_with_main_weights(root: Path) -> list[bool]:
    """Whether bfloat16's float32 weights and moments move between optimizers that keep them whole and sharded."""
    same = []
    for source, target, grid in (
        ("", "whole", replace(SINGLE, pipeline=(2, 1))),
        ("whole", "sharded", replace(SINGLE, data=2, **SHARDED)),
        ("sharded", "cut", replace(SINGLE, tensor=(2, True))),
    ):
        with trainee(root, grid, "bfloat16") as each:
            if source:
                each.checkpoint.load(root / source)
            else:
                each.train_step.update(each.updates[0])
            save(each, root / target)
        if source and dist.get_rank() == 0:
            one, other = checkpoint_tensors(root / source), checkpoint_tensors(root / target)
            assert one.keys() == other.keys() and len([name for name in one if ".param." in name]) == len(one) / 4
            same.append(all(torch.equal(bits(tensor), bits(other[name])) for name, tensor in one.items()))
    return same


def test_main_weights_of_bfloat16_do_not_depend_on_the_grid(root: Path) -> None:
    assert run_distributed(save_with_main_weights, 2, root)[0] == [True, True]


def save_shared_experts(root: Path, links: Sequence[tuple[Combination, str, str]]) -> None:
    # No model folder of the supported families has shared experts, so they are as they were drawn.
    HfBridge.load = lambda *_: None  # type: ignore[method-assign, assignment]
    for combination, source, target in links:
        overrides = {"moe_shared_expert_intermediate_size": 80}
        with trainee(root, combination, transformer_config_overrides=overrides) as each:
            if source:
                each.checkpoint.load(root / source)
            else:
                each.train_step.update(each.updates[0])
            save(each, root / target)


def test_shared_experts_do_not_depend_on_the_grid(root: Path) -> None:
    cut = replace(MOE, tensor=(2, True), expert=2, expert_tensor=1)
    run_distributed(save_shared_experts, 1, root, [(MOE, "", "shared_whole")])
    run_distributed(
        save_shared_experts,
        2,
        root,
        [(cut, "shared_whole", "shared_cut"), (replace(MOE, data=2, **SHARDED), "shared_cut", "shared_data")],
    )
    whole = checkpoint_tensors(root / "shared_whole")
    assert len([name for name in whole if ".shared_experts." in name]) == 4 * 3 * 3
    for other in (checkpoint_tensors(root / name) for name in ("shared_cut", "shared_data")):
        assert other.keys() == whole.keys()
        assert all(torch.equal(bits(tensor), bits(other[name])) for name, tensor in whole.items())


def save_both_ways(root: Path) -> list[str]:
    faults = []
    with trainee(root, replace(SINGLE, data=2, **SHARDED)) as each:
        each.train_step.update(each.updates[0])
        at_once = save(each, root / "at_once")
        make(root / "behind")
        gate, write = threading.Event(), StagedWriter._write
        StagedWriter._write = lambda writer: gate.wait() and write(writer)  # type: ignore[method-assign]
        pending = each.checkpoint.begin_save(root / "behind")
        if psutil.Process().children():
            faults.append("a save has a process of its own, which a killed rank would leave behind")
        # The actor goes on, and off the device, while the files are written.
        each.train_step.update(each.updates[1])
        memory = ActorMemory(each.actor.chunks, each.optimizer)
        memory.offload_optimizer()
        memory.offload_parameters()
        if pending.is_done:
            faults.append("a save that has not begun to write says that it is done")
        gate.set()
        behind = {name: record.sha256 for name, record in pending.finish().items()}
        memory.restore()
        if at_once != behind:
            faults.append("files differ")
        names = ("state.json", "metadata.json", ".metadata")
        if any((root / "at_once" / name).read_bytes() != (root / "behind" / name).read_bytes() for name in names):
            faults.append("index or state differs")
        again = save(each, root / "again")
        if set(again.values()) & set(at_once.values()):
            faults.append("the later save holds the earlier state")
        each.train_step.update(each.updates[2])
        each.checkpoint.load(root / "again")
        if save(each, root / "reloaded") != again:
            faults.append("loading does not undo an update")
    return faults


def test_behind_the_training_the_same_bytes_are_written(root: Path) -> None:
    assert run_distributed(save_both_ways, 2, root) == [[], []]


def refuse_strangers(root: Path, folder: Path) -> list[str]:
    """What is said of checkpoints that cannot be loaded."""
    told = []

    def refused(combination: Combination, source: Path, dtype: str = "float32") -> None:
        with trainee(root, combination, dtype) as each, pytest.raises(CheckpointError) as caught:
            each.checkpoint.load(source)
        told.append(str(caught.value))

    with trainee(root, SINGLE) as each:
        # Before the first update there are no moments yet.
        save(each, folder)
        index = (folder / ".metadata").read_bytes()
        with pytest.raises(CheckpointError, match="cannot be read"):
            (folder / ".metadata").write_bytes(index[:-40])
            each.checkpoint.load(folder)
        (folder / ".metadata").write_bytes(index)
        each.checkpoint.load(folder)
    # An evaluation needs the weights alone.
    with trainee(root, SINGLE) as each:
        before = each.state()
        each.train_step.update(each.updates[0])
        optimizer = [bits(tensor).clone() for tensor in each.optimizer.state_tensors() if tensor.requires_grad is False]
        ActorCheckpoint(each.actor.chunks, None, each.actor.context).load(folder)
        count = sum(1 for chunk in each.actor.chunks for _ in chunk.parameters())
        assert each.state()[:count] == before[:count]
        kept = [bits(tensor) for tensor in each.optimizer.state_tensors() if tensor.requires_grad is False]
        assert len(kept) == 2 * count and all(map(torch.equal, kept, optimizer))
    refused(MOE, folder)
    refused(SINGLE, folder, "bfloat16")
    return told


def test_another_models_checkpoint_is_refused(root: Path, tmp_path: Path) -> None:
    (told,) = run_distributed(refuse_strangers, 1, root, tmp_path / "saved")
    assert "is of another model: it has no decoder.layers.0" in told[0]
    assert "is of another precision" in told[1] and "torch.float32 there and torch.bfloat16 here" in told[1]
