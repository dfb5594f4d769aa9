"""The patches of a machine without CUDA: that they do what upstream needs, and that upstream still needs them."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from transformers import AutoModelForCausalLM

from megatron_fipo.platform import cpu_shims
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_cuda_literals_land_on_the_cpu() -> None:
    cpu_shims.install()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.arange(2, device=torch.device("cuda", 1), pin_memory=True).device.type == "cpu"
    assert torch.ones(1).cuda().to("cuda:0").device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_random_state_round_trips() -> None:
    cpu_shims.install()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_meta_device_context_still_works() -> None:
    cpu_shims.install()
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"


def test_transformers_models_load_with_their_buffers(tmp_path: Path, uninitialised_memory_is_nan: None) -> None:
    cpu_shims.install()
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"))
    expected = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(model.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize(
    ("place", "needs"),
    [
        (rotary_pos_embedding, "torch.cuda.current_device()"),
        (megatron_optimizer, "device='cuda'"),
        (megatron_optimizer, "'torch.cuda.FloatTensor'"),
        (megatron_random, "torch.cuda"),
        (moe_utils, "tensor.is_cuda"),
    ],
)
def test_upstream_still_needs_the_patch(place: object, needs: str) -> None:
    assert needs in inspect.getsource(place), "upstream changed: is the patch in cpu_shims still needed?"
