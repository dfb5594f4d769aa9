"""Checkpoint → Hugging Face folder → checkpoint → folder, bit by bit, whatever grid wrote the first one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_fipo.actor.checkpoint import ActorCheckpoint
from megatron_fipo.actor.model import unwrap
from megatron_fipo.platform.checkpoint_reader import read_index
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.checkpointing import ACTOR_FOLDER
from megatron_fipo.trainer.convert import to_megatron as to_megatron_module
from megatron_fipo.trainer.convert.command import convert
from megatron_fipo.trainer.convert.options import ConvertOptions
from megatron_fipo.trainer.convert.to_hf import to_hf
from megatron_fipo.trainer.convert.to_megatron import to_megatron
from megatron_fipo.trainer.convert.words import Conversion
from tests.conversions import all_files, bridge_export, folder_bytes, tensor_bytes, write_checkpoint
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import tiny_actor
from tests.tiny_models import VOCAB_SIZE, add_output_matrix, write_tiny_model

pytestmark = pytest.mark.distributed

# The vocabulary of 301 has padding rows wherever tensors are parallel.
assert VOCAB_SIZE % 2

MODELS: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"architecture": "qwen2"},
    "qwen2": {"architecture": "qwen2", "tied": False},
    "qwen3": {"architecture": "qwen3", "tied": False},
    "qwen3, tied": {"architecture": "qwen3"},
    "qwen3_moe": {"architecture": "qwen3_moe"},
    "llama": {"architecture": "llama", "tied": False},
    "llama, tied": {"architecture": "llama"},
}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 1": (1, {}),
    "TP 2": (2, TP),
    "PP 2": (2, PP),
    "TP 2 × PP 2": (4, TP | PP),
    "EP 2": (2, EP),
}
# Small files, so that there are several; the logits are compared once a model, in the tests below.
OPTIONS = ConvertOptions(max_file_bytes=120_000, verify="bytes")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert")
    for name, options in MODELS.items():
        write_tiny_model(root / name, **options, num_hidden_layers=2)
    return root


def go_round(root: Path, cases: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    """What is wrong with each case's way from its grid's checkpoint to a folder, and back into its grid."""
    # Memory that was never written reads as NaN.
    torch.use_deterministic_algorithms(True)
    faults: dict[str, list[str]] = {}
    for model, grid, dtype in cases:
        parallelism, here = GRIDS[grid][1], root / "round" / f"{model}, {grid}, {dtype}"
        write_checkpoint(root / model, here / "saved", parallelism, dtype)
        to_hf(here / "saved", here / "hf", OPTIONS)
        to_megatron(here / "hf", here / "again", OPTIONS)
        to_hf(here / "again", here / "hf again", OPTIONS)
        with tiny_actor(root / model, parallelism, dtype=dtype) as actor:
            before = [tensor_bytes(each) for chunk in unwrap(actor.chunks) for each in chunk.parameters()]
            for chunk in unwrap(actor.chunks):
                for parameter in chunk.parameters():
                    parameter.data.fill_(7.0)
            ActorCheckpoint(actor.chunks, None, actor.context).load(here / "again" / ACTOR_FOLDER)
            after = [tensor_bytes(each) for chunk in unwrap(actor.chunks) for each in chunk.parameters()]
        found = faults[f"{model}, {grid}, {dtype}"] = []
        if not same_but_for_padding(before, after):
            found.append("the checkpoint that was made of the folder loads as other weights")
        if dist.get_rank() == 0:
            found += differences(folder_bytes(here / "hf"), root / f"{model} by bridge, {dtype}")
            first, second = all_files(here / "hf"), all_files(here / "hf again")
            # The cards tell of different origins.
            names = (first.keys() | second.keys()) - {"README.md"}
            found += [name for name in names if first.get(name) != second.get(name)]
            shutil.rmtree(here)
        dist.barrier()
    return faults


def same_but_for_padding(before: list[bytes], after: list[bytes]) -> bool:
    """Padding rows of the vocabulary are no part of a model: those of the one that was filled stay."""
    filled = [
        torch.tensor(7.0, dtype=dtype).view(-1).view(torch.uint8).numpy().tobytes()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return all(
        mine == other
        or any(other.endswith(value * 64) and mine[: -64 * len(value)] == other[: -64 * len(value)] for value in filled)
        for mine, other in zip(before, after, strict=True)
    )


def differences(folder: dict[str, bytes], oracle: Path) -> list[str]:
    expected = torch.load(oracle)
    return [name for name in folder.keys() | expected.keys() if folder.get(name) != expected.get(name)]


def write_oracles(root: Path, cases: list[tuple[str, str]]) -> None:
    for model, dtype in cases:
        torch.save(bridge_export(root / model, dtype), root / f"{model} by bridge, {dtype}")


def round_all(root: Path, cases: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    oracles = sorted({(model, dtype) for model, _, dtype in cases})
    run_distributed(
        write_oracles, 1, root, [each for each in oracles if not (root / f"{each[0]} by bridge, {each[1]}").exists()]
    )
    faults: dict[str, list[str]] = {}
    for world_size in sorted({GRIDS[grid][0] for _, grid, _ in cases}):
        here = [case for case in cases if GRIDS[case[1]][0] == world_size]
        for results in run_distributed(go_round, world_size, root, here):
            for case, found in results.items():
                faults[case] = faults.get(case, []) + found
    return faults


# Every family in every grid, and each kind of tying once.
CASES = [
    *(
        (model, grid, "bfloat16")
        for model in ("qwen2, tied", "qwen3", "qwen3_moe", "llama")
        for grid in list(GRIDS)[:4]
    ),
    ("qwen3_moe", "EP 2", "bfloat16"),
    ("qwen2", "TP 2", "float32"),
]


@pytest.fixture(scope="module")
def rounds(root: Path) -> dict[str, list[str]]:
    return round_all(root, CASES)


@pytest.mark.parametrize("case", [", ".join(case) for case in CASES])
def test_every_bit_comes_back(rounds: dict[str, list[str]], case: str) -> None:
    assert rounds[case] == []


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_every_bit_comes_back_for_every_model_grid_and_precision(root: Path) -> None:
    cases = [
        (model, grid, dtype)
        for model in MODELS
        for grid in GRIDS
        for dtype in ("float32", "bfloat16")
        if model == "qwen3_moe" or grid != "EP 2"
    ]
    faults = round_all(root, cases)
    assert len(faults) == len(cases) and not any(faults.values()), faults


def through_other_names(root: Path) -> list[str]:
    """As where Transformer Engine is: the norm before experts has a name of its own."""
    here = root / "other names"
    to_megatron_module.uses_transformer_engine = lambda: True
    to_megatron(root / "qwen3_moe", here / "checkpoint", OPTIONS)
    to_hf(here / "checkpoint", here / "hf", OPTIONS)
    return list(read_index(here / "checkpoint" / ACTOR_FOLDER).state_dict_metadata)


def test_transformer_engines_names_are_read_and_written(root: Path) -> None:
    (names,) = run_distributed(through_other_names, 1, root)
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in names
    assert not any("linear_fc1.layer_norm" in name for name in names)
    assert folder_bytes(root / "other names" / "hf") == folder_bytes(root / "qwen3_moe")


def with_the_output_matrix_twice(root: Path) -> list[str]:
    """A tied model whose folder has the embedding as its output matrix, too; then with another one there."""
    here = root / "twice"
    add_output_matrix(shutil.copytree(root / "qwen2, tied", here / "hf"), 1.0)
    to_megatron(here / "hf", here / "checkpoint", OPTIONS)
    verify = Conversion(direction="verify", source=here / "checkpoint", target=here / "hf", options=OPTIONS)
    convert(verify)
    tensors = load_file(here / "hf" / "model.safetensors")
    tensors["lm_head.weight"][300, 63] += 1
    save_file(tensors, here / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError) as caught:
        convert(verify)
    return [str(caught.value)]


def test_a_tied_output_matrix_is_compared_with_the_embedding(root: Path) -> None:
    (told,) = run_distributed(with_the_output_matrix_twice, 1, root)
    assert told == [
        f"{root}/twice/hf differs from {root}/twice/checkpoint: lm_head.weight has other bytes, though it is tied to "
        "model.embed_tokens.weight"
    ]
