"""The actor on a CUDA device: what the CPU suite cannot see."""

import math
from pathlib import Path

import pytest
import torch

from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.safeguards import SafeguardsConfig
from megatron_fipo.parallel.context import destroy_parallel_context
from megatron_fipo.trainer.build import build_run
from megatron_fipo.trainer.export import export_when_done
from megatron_fipo.trainer.loop import assemble_batch, compute_old_log_probs, distribute_batch, update_policy
from megatron_fipo.trainer.replay import open_dump, replay
from tests.recorded_batches import record_batch
from tests.tiny_models import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FIPO = FipoConfig.preset("official-7b", aggregation="token_mean")


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
            safeguards=SafeguardsConfig(dump_step=1, dump_update=3),
        )
    )
    batch = assemble_batch(run, 1, None)
    micro_batches = distribute_batch(run, batch)
    compute_old_log_probs(run, micro_batches)
    results = update_policy(run, 1, micro_batches, batch)
    assert [result.applied for result in results] == [True] * 8
    assert all(math.isfinite(result.loss) and result.grad_norm > 0 for result in results)
    assert results[0].metrics["fipo/fraction_changed"] == 0.0, "the null mini-batch"
    assert results[1].metrics["fipo/fraction_changed"] > 0.2
    # The export's card tells of it.
    assert run.directory is not None
    run.directory.append_metrics({"step": 1})
    export_when_done(run)
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    destroy_parallel_context()
    again = replay(*open_dump(tmp_path / "run" / "dumps" / "step_1", []))
    numbers = {each.name: each for each in again.numbers}
    assert again.is_same_cut and numbers["loss"].is_same
    assert [each.differing for each in again.packs] == [0] * len(again.packs)
    # The backward pass may add in any order.
    assert numbers["gradient norm"].now == pytest.approx(numbers["gradient norm"].before, rel=1e-5)
