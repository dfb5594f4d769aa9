"""The official rules on sequences that are split over context-parallel ranks, in zigzag and in contiguous chunks."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.metrics.reduce import reduce_metrics
from megatron_fipo.parallel.layout import PackLayout, Scheme
from megatron_fipo.types import merge_metrics, render_metrics
from tests.distributed_helpers import run_distributed
from tests.unit.algorithms import oracle
from tests.unit.algorithms.responses import assert_same, pack, random_mini_batch

pytestmark = pytest.mark.distributed

WORLD_SIZE = 3
SEEDS = range(25)
PRESETS = ("official-32b", "official-7b", "paper-v1", "paper-v2")
SCHEMES: tuple[Scheme, ...] = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Part:
    """What one rank has of a mini-batch: its tokens, micro-batch by micro-batch, and what all ranks agree on."""

    numerator: float
    denominator: int
    tokens: list[dict[str, Tensor]]
    metrics: dict[str, float]


def part_of(whole: LossInputs, layout: PackLayout) -> LossInputs:
    """This rank's share of a pack."""
    names = ("old_log_probs", "advantages", "response_mask", "rollout_log_probs", "entropy")
    columns = {name: layout.shard(getattr(whole, name)) for name in names}
    log_probs = layout.shard(whole.log_probs.detach()).clone().requires_grad_()
    return replace(whole, layout=layout, log_probs=log_probs, **columns)


def update(config: FipoConfig, seed: int, scheme: Scheme) -> Part:
    """One mini-batch on this rank."""
    group, rank = dist.group.WORLD, dist.get_rank()
    outputs, tokens = [], []
    for responses in random_mini_batch(seed):
        whole = pack(responses)
        inputs = part_of(whole, PackLayout(whole.layout.padded_lengths, WORLD_SIZE, rank, scheme))
        output = policy_loss(inputs, config, group)
        (gradient,) = torch.autograd.grad(output.numerator, [inputs.log_probs])
        outputs.append(output)
        columns = {name: getattr(output, name) for name in ("future_kl", "influence_weights", "kept_mask")}
        tokens.append({"gradient": gradient, **columns})
    metrics = reduce_metrics(merge_metrics([output.metrics for output in outputs]), group)
    return Part(
        numerator=sum(float(output.numerator.detach()) for output in outputs),
        denominator=sum(int(output.denominator) for output in outputs),
        tokens=tokens,
        metrics=render_metrics(metrics),
    )


def update_all() -> dict[tuple[str, int, Scheme], Part]:
    return {
        (preset, seed, scheme): update(FipoConfig.preset(preset), seed, scheme)
        for preset in PRESETS
        for seed in SEEDS
        for scheme in SCHEMES
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, int, Scheme], Part]]:
    return run_distributed(update_all, WORLD_SIZE)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("preset", PRESETS)
def test_split_sequences_follow_the_rules(ranks, preset: str, scheme: Scheme) -> None:
    for seed in SEEDS:
        parts = [rank[preset, seed, scheme] for rank in ranks]
        assert all(part.metrics == parts[0].metrics for part in parts)
        denominator = max(sum(part.denominator for part in parts), 1)
        micro_batches = random_mini_batch(seed)
        tokens: dict[str, list[np.ndarray]] = {}
        for number, responses in enumerate(micro_batches):
            whole = pack(responses)
            layout = PackLayout(whole.layout.padded_lengths, WORLD_SIZE, 0, scheme)
            for name in parts[0].tokens[number]:
                joined = layout.unshard([part.tokens[number][name] for part in parts])
                tokens.setdefault(name, []).append(joined[whole.response_mask].numpy())
        values = {name: np.concatenate(pieces) for name, pieces in tokens.items()}
        values["gradient"] = values["gradient"] / denominator
        assert_same(
            oracle.mini_batch(micro_batches, FipoConfig.preset(preset)),
            loss=sum(part.numerator for part in parts) / denominator,
            metrics=parts[0].metrics,
            relative=1e-6,
            absolute=1e-12,
            **values,
        )
