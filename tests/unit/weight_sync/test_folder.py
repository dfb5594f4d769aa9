"""A model folder streamed into the embedded engine, against transformers' own loading."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.hf_folder import read_model_config
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.weight_sync.folder import FolderSync
from tests.tiny_models import write_tiny_model


def engine_of(folder: Path, dtype: torch.dtype = torch.float32) -> EmbeddedEngine:
    return EmbeddedEngine(read_model_config(folder), folder, dtype, max_batch_sequences=4)


@pytest.mark.parametrize(
    ("architecture", "tied", "dtype"),
    [
        ("qwen2", True, torch.float32),
        ("qwen3", False, torch.bfloat16),
        ("qwen3_moe", False, torch.float32),
    ],
)
def test_the_engine_holds_the_folders_weights(
    tmp_path: Path, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    folder = write_tiny_model(tmp_path / "model", architecture, tied=tied)
    engine = engine_of(folder, dtype)
    # Of 1 MiB, the smallest there is, the tiny model takes several buckets.
    FolderSync(folder, engine, WeightSyncConfig(bucket_mib=1)).push(7)
    assert engine.policy_version == 7
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    actual = engine.model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def rewrite(folder: Path, extra: dict[str, torch.Tensor], absent: str = "") -> None:
    tensors = load_file(folder / "model.safetensors") | extra
    tensors.pop(absent, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    way_out = "fetch the model's files again, config.json and weights from one place"
    unfit = f"model.path = {folder}: its weights do not fit its config.json: "
    norm = "model.norm.weight"
    kept = load_file(folder / "model.safetensors")[norm]
    for extra, absent, problem in (
        ({"strange": torch.ones(1)}, "", "has a tensor 'strange' that its model lacks"),
        ({norm: torch.ones(3)}, "strange", f"the weight stream has {norm} as [3], not [64]"),
        ({}, norm, f"the weight stream lacks 1 tensors: ['{norm}']"),
    ):
        rewrite(folder, extra, absent)
        with pytest.raises(ConfigError) as caught:
            FolderSync(folder, engine_of(folder), WeightSyncConfig()).push(0)
        assert str(caught.value) == f"{unfit}{problem}; {way_out}"
    rewrite(folder, {norm: kept})
    FolderSync(folder, engine_of(folder), WeightSyncConfig()).push(0)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == len(kept)
