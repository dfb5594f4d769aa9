"""The actor on a CUDA device: what the CPU suite cannot see."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor.log_probs import VocabularyShard, linear_log_probs
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.parallel.context import destroy_parallel_context
from megatron_fipo.trainer.build import build_run
from megatron_fipo.trainer.export import export_when_done
from megatron_fipo.trainer.loop import assemble_batch, compute_old_log_probs, distribute_batch, update_policy
from tests.recorded_batches import record_batch
from tests.tiny_models import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FIPO = FipoConfig.preset("official-7b", aggregation="token_mean")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(vocab_size: int) -> VocabularyShard:
    group = torch.distributed.group.WORLD
    assert group is not None
    return VocabularyShard(start=0, vocab_size=vocab_size, group=group)


@pytest.mark.parametrize("recompute", [False, True])
def test_log_probs_match_float64(world: None, recompute: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1000, (300,), device="cuda")
    log_probs, _ = linear_log_probs(
        hidden, weight, targets, shard(1000), temperature=0.7, chunk_tokens=77, recompute_logits=recompute
    )
    exact = ((hidden.double() @ weight.double().t()) / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (log_probs - exact).abs().max() < 1e-3
    factors = torch.randn(300, device="cuda", dtype=torch.float64)
    mine = torch.autograd.grad((log_probs * factors).sum(), (hidden, weight))
    wanted = torch.autograd.grad((exact * factors).sum(), (hidden, weight))
    for got, reference in zip(mine, wanted, strict=True):
        assert (got - reference).norm() / reference.norm() < 2e-3


def test_log_probs_keep_one_copy_of_the_logits(world: None) -> None:
    tokens, vocab_size = 4096, 32768
    hidden = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocab_size, (tokens,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs, _ = linear_log_probs(hidden, weight, targets, shard(vocab_size), chunk_tokens=64)
    log_probs.sum().backward()
    torch.cuda.synchronize()
    logits_bytes = tokens * vocab_size * 2
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * logits_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rollout_of_updates(world: None, tmp_path: Path, dtype: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    record_batch(model, tmp_path / "recorded", FIPO)
    run = build_run(
        RunConfig(
            output_dir=tmp_path / "run",
            num_steps=1,
            mode="train_only",
            recorded_rollouts=tmp_path / "recorded",
            model=ModelConfig(path=model, dtype=dtype),
            algorithm=FIPO,
            rollout=RolloutConfig(num_prompts_per_step=8, group_size=4, max_response_tokens=40),
            parallelism=ParallelismConfig(max_tokens_per_micro_batch=256),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
            checkpoint=CheckpointConfig(export_dtype="bfloat16"),
        )
    )
    micro_batches = distribute_batch(run, assemble_batch(run, 1, None))
    compute_old_log_probs(run, micro_batches)
    results = update_policy(run, 1, micro_batches)
    assert [result.applied for result in results] == [True] * 8
    assert all(math.isfinite(result.loss) and result.grad_norm > 0 for result in results)
    assert results[0].metrics["fipo/fraction_changed"] == 0.0, "the null mini-batch"
    assert results[1].metrics["fipo/fraction_changed"] > 0.2
    export_when_done(run)
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    destroy_parallel_context()
