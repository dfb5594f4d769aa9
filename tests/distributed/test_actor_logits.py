"""The actor computes what transformers computes, on every process grid, and after an override of the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fipo.actor.model import unwrap
from megatron_fipo.conversion.hf_folder import HfFolderWriter
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import random_batch, sequence_logits, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

# Largest difference of any logit, float32 against float32.
TOLERANCE = 1e-4
BATCH = random_batch([33, 64, 17, 48, 1, 7])

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP = {"context_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}

CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    1: {
        "qwen2": ("qwen2", {}),
        "qwen3": ("qwen3", {}),
        "llama": ("llama", {}),
        "qwen3_moe": ("qwen3_moe", {}),
        "qwen2, small packs": ("qwen2", {"max_tokens_per_micro_batch": 64}),
    },
    2: {
        "qwen3, TP 2": ("qwen3", TP),
        "llama, CP 2": ("llama", CP),
        "qwen2, PP 2": ("qwen2", PP),
        "qwen3_moe, TP 2 × EP 2": ("qwen3_moe", TP | {"expert_model_parallel_size": 2}),
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logits")
    for architecture in ("qwen2", "qwen3", "qwen3_moe", "llama"):
        write_tiny_model(root / architecture, architecture)
    return root


def expected_logits(folder: Path) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = np.split(BATCH.token_ids, BATCH.sequence_starts[1:-1])
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(ids).long()[None]).logits[0] for ids in sequences]


def largest_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(actual, expected, strict=True))


def differences(root: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, float | None]:
    """Per case the largest difference, None off the last pipeline stage."""
    results: dict[str, float | None] = {}
    for case, (architecture, parallelism) in cases.items():
        with tiny_actor(root / architecture, parallelism) as actor:
            logits = sequence_logits(actor, BATCH)
        results[case] = largest_difference(logits, expected_logits(root / architecture)) if logits else None
    return results


@pytest.mark.parametrize("world_size", CASES)
def test_logits_equal_those_of_transformers(root, world_size):
    for rank, results in enumerate(run_distributed(differences, world_size, root, CASES[world_size])):
        for case, difference in results.items():
            if difference is None:
                assert rank == 0
                assert case == "qwen2, PP 2"
            else:
                assert difference <= TOLERANCE, case


OVERRIDES = {"context_length": 2048, "rope_base": 1e6}


def export_with_overrides(root: Path, architecture: str) -> dict[str, Any]:
    """Logits of actor and export, both against the unchanged model's."""
    target = root / f"{architecture} exported"
    with tiny_actor(root / architecture, **OVERRIDES) as actor:
        config = actor.bridge.export_config(torch.float32)
        writer = HfFolderWriter(target, root / architecture, config)
        writer.write(actor.bridge.export(unwrap(actor.chunks)))
        writer.folder.commit()
        logits = sequence_logits(actor, BATCH)
        seq_length = actor.provider.seq_length
    exported = AutoModelForCausalLM.from_pretrained(target)
    return {
        "config": config,
        "seq_length": seq_length,
        "read back": (exported.config.max_position_embeddings, exported.config.rope_parameters["rope_theta"]),
        "to the export": largest_difference(logits, expected_logits(target)),
        "to the source": largest_difference(logits, expected_logits(root / architecture)),
    }


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_overrides_reach_the_actor_and_the_export(root, architecture):
    (result,) = run_distributed(export_with_overrides, 1, root, architecture)
    assert result["config"]["max_position_embeddings"] == result["seq_length"] == 2048
    assert result["config"]["rope_theta"] == result["config"]["rope_parameters"]["rope_theta"] == 1e6
    assert result["config"]["dtype"] == "float32"
    assert result["read back"] == (2048, 1e6)
    assert result["to the export"] <= TOLERANCE
    assert result["to the source"] > 100 * TOLERANCE
