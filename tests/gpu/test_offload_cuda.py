"""An actor that leaves a CUDA device frees its memory there."""

from pathlib import Path

import pytest
import torch

from megatron_fipo.actor.offload import ActorMemory
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.platform.device import compute_device
from tests.tiny_actors import bits, random_batch, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_freed_and_comes_back_bit_by_bit(world: None, tmp_path: Path, dtype: str) -> None:
    with tiny_actor(write_tiny_model(tmp_path / "model"), {"max_tokens_per_micro_batch": 64}, dtype=dtype) as actor:
        optimizer = ActorOptimizer(actor.chunks, OptimizerConfig(warmup_steps=0), actor.provider.bf16)
        train_step = TrainStep(actor.forward, optimizer, FipoConfig.preset("paper-v2"), actor.context)
        ((*mini_batch,),) = shard_micro_batches(
            random_batch([40, 33, 21]), packing_rules(actor.parallelism), actor.context, compute_device()
        )
        for micro_batch, log_probs in zip(mini_batch, actor.forward.log_probs(mini_batch), strict=True):
            micro_batch.old_log_probs = log_probs
        assert train_step.update(mini_batch).applied
        memory = ActorMemory(actor.chunks, optimizer)
        kept = [*optimizer.state_tensors(), *(each for chunk in actor.chunks for each in chunk.parameters())]
        before, held = [bits(each).clone().cpu() for each in kept], None
        for _ in range(3):
            allocated = torch.cuda.memory_allocated()
            memory.offload_optimizer()
            memory.offload_parameters()
            freed = memory.drain()
            assert allocated - torch.cuda.memory_allocated() >= freed > 0
            memory.restore()
            assert torch.cuda.memory_allocated() <= allocated
            assert all(torch.equal(bits(each).cpu(), was) for each, was in zip(kept, before, strict=True))
            assert held in (None, memory.host_bytes)
            held = memory.host_bytes
        assert train_step.update(mini_batch).applied
