"""Every metric of an update from given log-probabilities, however its sequences are cut over ranks and micro-batches.

Counts, extremes and quantiles are equal bit for bit; sums, and the extremes of the raw influence weights, which come of
sums, to the rounding of float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.reduce import reduce_metrics
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import Metrics, merge_metrics, render_metrics
from tests.distributed_helpers import run_distributed

MIS = RolloutCorrectionConfig(kind="mask", level="sequence", low=0.999, high=1.001)
CONFIG = FipoConfig.preset("official-7b", dual_clip=6.0, rollout_correction=MIS)
NUM_SEQUENCES = 24
# Data-parallel × context-parallel size, and sequences of a micro-batch.
GRIDS = [(4, 1, 1), (4, 1, 5), (2, 2, 3), (2, 2, 12), (1, 4, 24), (1, 4, 7)]
BIT_FOR_BIT = ("quantile", "sum", "max", "min")


@dataclass(frozen=True)
class Tokens:
    """One sequence: a multiple of 8 tokens, so that it can be cut for 4 context-parallel ranks."""

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    rollout_log_probs: torch.Tensor
    entropy: torch.Tensor
    response_mask: torch.Tensor
    advantages: torch.Tensor


def sequence(index: int) -> Tokens:
    draws = torch.Generator().manual_seed(index)
    length = 8 * int(torch.randint(1, 20, (), generator=draws))

    def noise() -> torch.Tensor:
        return torch.randn(length, generator=draws, dtype=torch.float64)

    old = -noise().abs()
    prompt = int(torch.randint(1, length, (), generator=draws))
    return Tokens(
        log_probs=old + (0.3 + index % 3 / 2) * noise(),
        old_log_probs=old,
        rollout_log_probs=old + 0.01 * noise(),
        entropy=noise().abs(),
        response_mask=torch.arange(length) >= prompt,
        advantages=torch.full((length,), (-1.0) ** index * (1 + index / 10), dtype=torch.float64),
    )


def micro_batch_metrics(indices: Sequence[int], cp_size: int, cp_rank: int, group: dist.ProcessGroup | None) -> Metrics:
    parts = [sequence(index) for index in indices]
    layout = PackLayout(tuple(len(part.log_probs) for part in parts), cp_size, cp_rank)

    def local(name: str) -> torch.Tensor:
        return layout.shard(torch.cat([getattr(part, name) for part in parts]))

    names = ("log_probs", "old_log_probs", "rollout_log_probs", "entropy", "response_mask", "advantages")
    lengths = torch.tensor([int(part.response_mask.sum()) for part in parts])
    inputs = LossInputs(layout=layout, response_lengths=lengths, **{name: local(name) for name in names})
    return policy_loss(inputs, CONFIG, group).metrics


def metrics_of_every_grid() -> list[dict[str, float]]:
    """Rendered metrics of every grid; sequences are shared out unevenly."""
    results = []
    for dp_size, cp_size, size in GRIDS:
        groups = [
            dist.new_group(list(range(first, first + cp_size))) for first in range(0, dist.get_world_size(), cp_size)
        ]
        dp_rank, cp_rank = divmod(dist.get_rank(), cp_size)
        mine = [index for index in range(NUM_SEQUENCES) if index % 5 % dp_size == dp_rank]
        parts = [
            micro_batch_metrics(mine[first : first + size], cp_size, cp_rank, groups[dp_rank])
            for first in range(0, len(mine), size)
        ]
        results.append(render_metrics(reduce_metrics(merge_metrics(parts), dist.group.WORLD)))
    return results


@pytest.mark.distributed
def test_metrics_do_not_depend_on_the_grid_or_on_micro_batches() -> None:
    whole = render_metrics(micro_batch_metrics(range(NUM_SEQUENCES), 1, 0, None))
    for key in ("fipo/dropped_sequences", *(f"train/ratio_negative_count_{name}" for name in ("2_3", "3_4", "4_c"))):
        assert whole[key] > 0, f"the sequences do not exercise {key}"
    for results in run_distributed(metrics_of_every_grid, 4, timeout_s=60.0):
        for grid, metrics in zip(GRIDS, results, strict=True):
            assert metrics.keys() == whole.keys()
            for key, value in whole.items():
                metric, _ = CATALOGUE.find(key)
                if metric.reduction in BIT_FOR_BIT and not key.endswith(("raw_min", "raw_max")):
                    assert metrics[key] == value, (grid, key)
                else:
                    assert metrics[key] == pytest.approx(value, rel=1e-12, abs=1e-14), (grid, key)
