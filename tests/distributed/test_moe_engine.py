"""A mixture-of-experts actor feeds the embedded engine, whose experts transformers keeps stacked."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.actor.model import build_model, build_provider, unwrap
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.context import build_parallel_context
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import WeightBucket
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.weight_sync.in_process import InProcessSync
from tests.distributed_helpers import run_distributed
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed


def push_and_compare(folder: Path) -> tuple[float, int]:
    """Largest difference of the fed engine's logits from the folder's model, and the engine's version."""
    quiet_upstream()
    parallelism = ParallelismConfig(expert_model_parallel_size=2)
    context = build_parallel_context(parallelism, 1)
    bridge = HfBridge(folder)
    provider = build_provider(bridge, ModelConfig(path=folder, dtype="float32"), parallelism, context)
    chunks = unwrap(build_model(provider, bridge, parallelism, context))
    engine = EmbeddedEngine(bridge.export_config(torch.float32), folder, torch.float32, 8)
    InProcessSync(bridge, chunks, engine, WeightSyncConfig()).push(7)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(24).view(2, 12) * 7
    with torch.no_grad():
        difference = (engine.model(input_ids=ids).logits - expected(input_ids=ids).logits).abs().max()
    return float(difference), engine.policy_version


def missing_expert(folder: Path) -> str:
    """What the engine says of a stream without one matrix of one expert."""
    quiet_upstream()
    bridge = HfBridge(folder)
    engine = EmbeddedEngine(bridge.export_config(torch.float32), folder, torch.float32, 8)
    tensors = {name: torch.zeros(shape) for name, shape in bridge.shapes.items()}
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    try:
        engine.load(WeightBucket(tensors=tensors, policy_version=1, is_last=True))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("moe") / "model", "qwen3_moe")


def test_experts_reach_the_engine(folder: Path) -> None:
    for difference, version in run_distributed(push_and_compare, 2, folder):
        assert difference == 0.0
        assert version == 7


def test_a_missing_expert_matrix_is_noticed(folder: Path) -> None:
    (text,) = run_distributed(missing_expert, 1, folder)
    assert "lacks 1 tensors" in text and "layers.1.mlp.experts.gate_up_proj" in text
