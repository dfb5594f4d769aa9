"""The comparison of logits finds what is wrong with an export by itself, and says where it begins and what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fipo.actor.model import unwrap
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.convert.command import convert
from megatron_fipo.trainer.convert.options import ConvertOptions
from megatron_fipo.trainer.convert.to_hf import to_hf
from megatron_fipo.trainer.convert.words import Conversion
from megatron_fipo.trainer.probe import Probe
from tests.conversions import save_checkpoint, write_checkpoint
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3", "tied": False},
    "qwen3_moe": {"architecture": "qwen3_moe"},
    "llama": {"architecture": "llama", "tied": False},
}
NO_PROOF = ConvertOptions(verify="nothing")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every model a checkpoint after step 2, one after step 3 with other weights, and their exports."""
    root = tmp_path_factory.mktemp("logits")
    for name, options in MODELS.items():
        write_tiny_model(root / name, **options, num_hidden_layers=3)
    run_distributed(write_steps, 1, root)
    return root


def write_steps(root: Path) -> None:
    torch.manual_seed(0)
    for name in MODELS:
        with tiny_actor(root / name, dtype="bfloat16") as actor:
            for step in (2, 3):
                save_checkpoint(actor, root / f"{name} step {step}", step, "bfloat16")
                to_hf(root / f"{name} step {step}", root / f"{name} export {step}", NO_PROOF)
                for chunk in unwrap(actor.chunks):
                    for parameter in chunk.parameters():
                        parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)


# A mutant changes the tensors of an export, its configuration, or both, and is given the export of the step before.
Mutant = Callable[[Tensors, dict[str, Any], Tensors], None]
LAYER = "model.layers.1."


def permuted_qkv(tensors: Tensors, config: dict[str, Any], _: Tensors) -> None:
    """Queries, keys and values as they are cut where their matrix is not taken group by group."""
    names = [f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv"]
    heads = config["num_attention_heads"] // config["num_key_value_heads"]
    rows = [tensors[name].view(config["num_key_value_heads"], -1, tensors[name].shape[-1]) for name in names]
    assert rows[0].shape[1] == heads * rows[1].shape[1]
    fused = torch.cat(rows, dim=1).flatten(0, 1)
    sizes = [len(tensors[name]) for name in names]
    tensors.update({name: part.clone() for name, part in zip(names, fused.split(sizes), strict=True)})


def swapped_gate_and_up(tensors: Tensors, _: dict[str, Any], __: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(LAYER) and "gate_proj" in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def wrong_rope_base(_: Tensors, config: dict[str, Any], __: Tensors) -> None:
    config["rope_parameters"]["rope_theta"] *= 10


def stale_weight(tensors: Tensors, _: dict[str, Any], before: Tensors) -> None:
    name = f"{LAYER}self_attn.o_proj.weight"
    assert not torch.equal(tensors[name], before[name])
    tensors[name] = before[name]


def stale_router(tensors: Tensors, _: dict[str, Any], before: Tensors) -> None:
    name = f"{LAYER}mlp.gate.weight"
    tensors[name] = before[name]


def permuted_router(tensors: Tensors, _: dict[str, Any], __: Tensors) -> None:
    name = f"{LAYER}mlp.gate.weight"
    tensors[name] = tensors[name].roll(1, 0).contiguous()


def stale_norm(tensors: Tensors, _: dict[str, Any], before: Tensors) -> None:
    tensors["model.norm.weight"] = before["model.norm.weight"]


# What the error says: where the models part, and what differs.
MUTANTS: dict[str, tuple[Mutant, list[str]]] = {
    "permuted QKV": (permuted_qkv, [f"they part at {LAYER}self_attn (", f"{LAYER}self_attn.q_proj.weight has other"]),
    "swapped gate and up": (swapped_gate_and_up, ["they part at model.layers.1 (", "gate_proj.weight has other bytes"]),
    "wrong RoPE base": (wrong_rope_base, ["they part at model.layers.0.self_attn (", "'rope_theta': 100000.0"]),
    "stale weight": (stale_weight, [f"they part at {LAYER}self_attn (", f"{LAYER}self_attn.o_proj.weight has other"]),
    "stale norm": (stale_norm, ["they part at model.norm (", "model.norm.weight has other bytes"]),
}
ROUTER_MUTANTS: dict[str, tuple[Mutant, list[str]]] = {
    name: (mutant, ["they part at model.layers.1 (", f"{LAYER}mlp.gate.weight has other bytes"])
    for name, mutant in (("stale router", stale_router), ("permuted router", permuted_router))
}
MEMORY = {"whole": None, "layer by layer": 1}
Case = tuple[str, str, str]


def cases(model: str, memory: str) -> list[Case]:
    names = ["right", *MUTANTS, *(ROUTER_MUTANTS if model == "qwen3_moe" else [])]
    return [(model, memory, name) for name in names]


# Layer by layer of a dense model with tied embeddings, and of one with experts, which transformers stacks.
CASES = [
    *(case for model in MODELS for case in cases(model, "whole")),
    *((model, "layer by layer", name) for model in ("qwen2", "qwen3_moe") for name in ("right", "permuted QKV")),
]
MORE_CASES = [case for model in MODELS for case in cases(model, "layer by layer") if case not in CASES]


def judge_all(root: Path, cases: list[Case]) -> dict[Case, str]:
    """What is said of every mutant, and of what is right."""
    told: dict[Case, str] = {}
    for model, memory, name in cases:
        folder = root / "mutant"
        write_mutant(root, model, name, folder)
        options = ConvertOptions(verify="logits", memory_bytes=MEMORY[memory])
        told[model, memory, name] = verdict(root / f"{model} step 3", folder, options)
        shutil.rmtree(folder)
    return told


def write_mutant(root: Path, model: str, name: str, folder: Path) -> None:
    shutil.copytree(root / f"{model} export 3", folder)
    if name == "right":
        return
    tensors, before = (load_file(root / f"{model} export {step}" / "model.safetensors") for step in (3, 2))
    config = json.loads((folder / "config.json").read_text())
    (MUTANTS | ROUTER_MUTANTS)[name][0](tensors, config, before)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def verdict(checkpoint: Path, folder: Path, options: ConvertOptions) -> str:
    try:
        convert(Conversion(direction="verify", source=checkpoint, target=folder, options=options))
    except RunError as error:
        return f"{type(error).__name__}: {error}"
    return "equal"


@pytest.fixture(scope="module")
def verdicts(root: Path) -> dict[Case, str]:
    return run_distributed(judge_all, 1, root, CASES)[0]


def check(told: str, name: str) -> None:
    print(told)
    if name == "right":
        assert told == "equal"
        return
    assert told.startswith("ConversionError: ")
    assert "its logits differ" in told
    for text in (MUTANTS | ROUTER_MUTANTS)[name][1]:
        assert text in told


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_mutants_are_caught_by_their_logits_alone(verdicts: dict[Case, str], case: Case) -> None:
    check(verdicts[case], case[2])


@pytest.mark.exhaustive
def test_all_mutants_layer_by_layer(root: Path) -> None:
    for (_, _, name), told in run_distributed(judge_all, 1, root, MORE_CASES)[0].items():
        check(told, name)


def on_two_ranks(root: Path) -> list[str]:
    options = ConvertOptions(verify="logits")
    folder = root / "shared mutant"
    if dist.get_rank() == 0:
        write_mutant(root, "llama", "wrong RoPE base", folder)
    dist.barrier()
    return [verdict(root / "llama step 3", each, options) for each in (folder, root / "llama export 3")]


def test_every_rank_hears_of_a_difference(root: Path) -> None:
    ours, theirs = run_distributed(on_two_ranks, 2, root)
    assert ours == theirs
    assert ours[1] == "equal"
    assert "they part at model.layers.0.self_attn" in ours[0]


def with_and_without_replay(root: Path) -> list[str]:
    """Every expert has a twin that is as likely up to rounding, and gives something else."""
    model = write_tiny_model(root / "twins", "qwen3_moe", num_hidden_layers=3, num_experts=8, num_experts_per_tok=3)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name][4:] = tensors[name][:4] * (1 + 1e-7 * torch.randn(4, 64))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    write_checkpoint(model, root / "twins step 3")
    to_hf(root / "twins step 3", root / "twins export", NO_PROOF)
    pair = (root / "twins step 3", root / "twins export", ConvertOptions(verify="logits"))
    told = [verdict(*pair)]
    Probe.send_to = lambda *_: None  # type: ignore[method-assign]
    return [*told, verdict(*pair)]


def test_tokens_between_two_experts_are_no_difference(root: Path) -> None:
    ((equal, without),) = run_distributed(with_and_without_replay, 1, root)
    assert equal == "equal"
    assert "every tensor and setting is the checkpoint's" in without, "else there was nothing to replay"


def of_meaningless_folders(root: Path) -> list[str]:
    """What is said of folders whose checkpoint has the very same tensors."""
    told = []
    for name, value in (("model.layers.1.self_attn.o_proj.weight", torch.nan), ("lm_head.weight", 0.0)):
        folder = root / f"meaningless {name}"
        shutil.copytree(root / "llama", folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[name][..., :] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        options = ConvertOptions()
        try:
            convert(Conversion(direction="to-megatron", source=folder, target=root / "of nothing", options=options))
        except RunError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_logits_that_say_nothing_prove_nothing(root: Path) -> None:
    ((not_finite, zero),) = run_distributed(of_meaningless_folders, 1, root)
    for told, reason in (
        (not_finite, "; model.layers.1.self_attn.o_proj.weight is not finite; every tensor and setting is the checkp"),
        (zero, "; all of the folder's are 0, which says nothing of its weights: compare these with --verify bytes; "),
    ):
        assert told.startswith("ConversionError: ") and reason in told
    assert "they part at" not in not_finite + zero
    assert not (root / "of nothing").exists()
