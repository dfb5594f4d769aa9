"""Every tensor reaches exactly one sender, bit by bit as the whole export has it, whatever the process grid."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor.model import unwrap
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import bits, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
ETP = TP | {"expert_tensor_parallel_size": 2}

CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    1: {"one rank": ("qwen2, tied", {}), "experts on one rank": ("qwen3_moe", {})},
    2: {
        "PP 2, tied": ("qwen2, tied", PP),
        "VPP 2": ("qwen2", VPP),
        "EP 2": ("qwen3_moe", EP),
        "ETP 2": ("qwen3_moe", ETP),
        "DP 2": ("qwen2", {}),
    },
    4: {
        "TP 2 × PP 2, tied": ("qwen2, tied", TP | PP),
        "PP 2 × EP 2": ("qwen3_moe", PP | EP),
        "TP 2 × EP 2": ("qwen3_moe", TP | EP),
        "EP 4": ("qwen3_moe", {"expert_model_parallel_size": 4}),
        "CP 2 × EP 2 × DP 2": ("qwen3_moe", CP | EP),
        "CP 2 × TP 2": ("qwen2", CP | TP),
        "PP 2 × DP 2": ("qwen2", PP),
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    write_tiny_model(root / "qwen2, tied", "qwen2")
    write_tiny_model(root / "qwen2", "qwen2", tied=False)
    write_tiny_model(root / "qwen3_moe", "qwen3_moe")
    return root


def export_both_ways(root: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per case: the names that the whole export has, those of this rank's stage, and which of these differ."""
    torch.use_deterministic_algorithms(True)
    found = {}
    for case, (model, parallelism) in cases.items():
        with tiny_actor(root / model, parallelism) as actor:
            chunks = unwrap(actor.chunks)
            whole = {name: tensor.clone() for name, tensor in actor.bridge.export(chunks)}
            stage = actor.bridge.stage_export(chunks, actor.context)
            # Twice: the second stream goes over what the first one prepared.
            for _ in range(2):
                own = [(name, tensor.clone()) for name, tensor in stage.stream()]
            found[case] = {
                "whole": sorted(whole),
                "own": [name for name, _ in own],
                "is_sender": stage.is_sender,
                "different": [
                    name
                    for name, tensor in own
                    if tensor.dtype != whole[name].dtype or not torch.equal(bits(tensor), bits(whole[name]))
                ],
            }
    return found


@pytest.fixture(scope="module")
def exports(root: Path) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {}
    for world_size, cases in CASES.items():
        ranks = run_distributed(export_both_ways, world_size, root, cases)
        results |= {case: [rank[case] for rank in ranks] for case in cases}
    return results


@pytest.mark.parametrize(
    ("case", "num_stages"),
    [
        (case, parallelism.get("pipeline_model_parallel_size", 1))
        for cases in CASES.values()
        for case, (_, parallelism) in cases.items()
    ],
)
def test_the_senders_together_have_every_tensor_once(exports, case, num_stages):
    ranks = exports[case]
    assert sum(rank["is_sender"] for rank in ranks) == num_stages
    assert all(rank["own"] == [] for rank in ranks if not rank["is_sender"])
    assert all(rank["own"] for rank in ranks if rank["is_sender"])
    assert sorted(name for rank in ranks for name in rank["own"]) == ranks[0]["whole"]
    assert [rank["different"] for rank in ranks] == [[]] * len(ranks)
