import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from megatron_fipo.algorithms.future_kl import context_parallel, reference
from megatron_fipo.algorithms.policy_loss import LossInputs, LossOutput, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig, GrpoConfig
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import Accumulator, merge_metrics
from tests.distributed_helpers import run_distributed

pytestmark = pytest.mark.distributed

DROPPED = "fipo/dropped_sequences"
HALF_LIVES = [0.5, 32.0, 256.0, math.inf]
# Tokens of a chunk, so that every length fits every rank count: one token, a block of 64, and beside it.
CHUNK_LENGTHS = [(1,), (3, 1, 64), (65, 16, 130, 2), (150, 1)]

LOSSES: dict[str, AlgorithmConfig] = {
    "official-32b": FipoConfig.preset("official-32b"),
    "official-7b": FipoConfig.preset("official-7b", dual_clip=3.0),
    "token mean": FipoConfig.preset("official-7b", aggregation="token_mean", dual_clip=3.0),
    "sequence mean": FipoConfig.preset("official-7b", aggregation="sequence_mean", dual_clip=3.0),
    "paper-v1": FipoConfig.preset("paper-v1", decay_half_life_tokens=256.0),
    "paper-v2": FipoConfig.preset("paper-v2", rollout_importance_cap=2.0),
    "dapo": DapoConfig(),
    "dapo, official averaging": DapoConfig(aggregation="official_micro_batch"),
    "grpo": GrpoConfig(),
}


def scans_on_one_rank(cp_size: int) -> list[tuple[float, bool, int]]:
    """Largest error of the Future-KL, whether the counts agree, and collectives run, case by case."""
    results = []
    for chunks, half_life in itertools.product(CHUNK_LENGTHS, HALF_LIVES):
        layout = PackLayout(tuple(2 * cp_size * length for length in chunks), cp_size=cp_size, cp_rank=dist.get_rank())
        generator = torch.Generator().manual_seed(7)
        log_ratio = torch.randn(layout.num_tokens, generator=generator, dtype=torch.float64)
        clipped = torch.rand(layout.num_tokens, generator=generator) < 0.3
        expected = layout.shard(reference.future_kl(log_ratio, half_life, layout.cu_seqlens))
        with CommDebugMode() as communication:
            future_kl, counts = context_parallel.future_kl(
                layout.shard(log_ratio), half_life, layout, dist.group.WORLD, layout.shard(clipped)
            )
        wanted = [int(part.sum()) for part in clipped.split(layout.padded_lengths)]
        results.append(
            (
                float((future_kl - expected).abs().max()),
                counts.tolist() == wanted,
                communication.get_total_counts(),
            )
        )
    return results


@pytest.mark.parametrize("cp_size", [2, 4])
def test_scan_across_ranks_equals_the_definition_with_one_collective(cp_size):
    for cases in run_distributed(scans_on_one_rank, cp_size, cp_size):
        assert len(cases) == len(CHUNK_LENGTHS) * len(HALF_LIVES)
        for error, counts_agree, num_collectives in cases:
            assert error < 1e-11
            assert counts_agree
            assert num_collectives == 1


TWO_CLIPPED_TOKENS = 4
"""Seed of the pack whose first sequence has two tokens beyond the dual clip, held by different ranks."""


def whole_pack(seed: int, spread: float) -> LossInputs:
    """A pack that fits 1, 2 and 4 ranks.

    One sequence has a long response, one has it in its first eighth only (held by a single rank), one in
    the last token, one is filler, and one has several response spans (tool calls between them).
    """
    lengths = (160, 64, 8, 24, 128)
    spans = {0: [(10, 150)], 1: [(1, 8)], 2: [(7, 8)], 3: [], 4: [(5, 30), (40, 41), (60, 128)]}
    layout = PackLayout(lengths)
    generator = torch.Generator().manual_seed(seed)
    starts = layout.cu_seqlens.tolist()
    mask = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for index, parts in spans.items():
        for start, end in parts:
            mask[starts[index] + start : starts[index] + end] = True
    old = -torch.rand(layout.num_tokens, generator=generator) * 3
    noise = torch.randn(layout.num_tokens, generator=generator) * spread
    if seed == TWO_CLIPPED_TOKENS:
        noise[[20, 50]] = math.log(20.0)
    advantages = torch.tensor([-0.7, 1.1, -0.4, 0.0, 0.6])
    if seed % 2:
        advantages = -advantages
    return LossInputs(
        log_probs=(old + noise).masked_fill(~mask, math.nan),
        old_log_probs=old.masked_fill(~mask, math.nan),
        advantages=advantages[layout.local_sequence_ids],
        response_mask=mask,
        response_lengths=torch.tensor([int(part.sum()) for part in mask.split(lengths)]),
        layout=layout,
        rollout_log_probs=old + 0.05 * torch.randn(layout.num_tokens, generator=generator),
        entropy=torch.rand(layout.num_tokens, generator=generator),
    )


def on_rank(inputs: LossInputs, cp_size: int, cp_rank: int) -> LossInputs:
    layout = PackLayout(inputs.layout.padded_lengths, cp_size, cp_rank)
    names = ["old_log_probs", "advantages", "response_mask", "rollout_log_probs", "entropy"]
    return replace(
        inputs,
        layout=layout,
        log_probs=layout.shard(inputs.log_probs).requires_grad_(),
        **{name: layout.shard(getattr(inputs, name)) for name in names},
    )


CASES = list(itertools.product(LOSSES, [(0, 0.0), (1, 0.2), (2, 1.2), (3, 1.2), (TWO_CLIPPED_TOKENS, 0.0)]))


def plain(output: LossOutput, gradient: torch.Tensor) -> dict:
    return {
        "numerator": float(output.numerator.detach()),
        "denominator": int(output.denominator),
        "gradient": gradient,
        "future_kl": output.future_kl,
        "influence_weights": output.influence_weights,
        "kept_mask": output.kept_mask,
        "metrics": {
            key: (value.kind, float(value.total), float(value.count))
            for key, value in output.metrics.items()
            if isinstance(value, Accumulator)
        },
    }


def losses_on_one_rank(cp_size: int) -> list[dict]:
    results = []
    for name, (seed, spread) in CASES:
        inputs = on_rank(whole_pack(seed, spread), cp_size, dist.get_rank() if cp_size > 1 else 0)
        group = dist.group.WORLD if cp_size > 1 else None
        with CommDebugMode() as communication:
            output = policy_loss(inputs, LOSSES[name], group)
            (gradient,) = torch.autograd.grad(output.numerator, inputs.log_probs)
        results.append({**plain(output, gradient), "collectives": communication.get_total_counts()})
    return results


@pytest.mark.parametrize("cp_size", [2, 4])
def test_the_loss_does_not_depend_on_the_number_of_ranks(cp_size):
    ranks = run_distributed(losses_on_one_rank, cp_size, cp_size)
    for index, ((name, (seed, spread)), one) in enumerate(zip(CASES, losses_on_one_rank(1), strict=True)):
        case = f"{name}, seed {seed}"
        parts = [rank[index] for rank in ranks]
        pack = whole_pack(seed, spread)
        layout = PackLayout(pack.layout.padded_lengths, cp_size)
        total = sum(part["numerator"] for part in parts)
        assert total == pytest.approx(one["numerator"], rel=1e-7, abs=1e-9), case
        assert sum(part["denominator"] for part in parts) == one["denominator"], case
        for key in ("gradient", "future_kl", "influence_weights"):
            joined = layout.unshard([part[key] for part in parts])
            error = (joined - one[key]).norm() / one[key].norm().clamp(min=1e-12)
            assert error < 1e-6, (case, key)
        joined_mask = layout.unshard([part["kept_mask"] for part in parts])
        assert torch.equal(joined_mask, one["kept_mask"]), case
        assert_metrics_agree([part["metrics"] for part in parts], one["metrics"], case)
        fipo = isinstance(LOSSES[name], FipoConfig)
        assert all(part["collectives"] == int(fipo) for part in parts), case
        assert one["collectives"] == 0


def assert_metrics_agree(parts: list[dict], one: dict, case: str) -> None:
    def accumulators(metrics: dict) -> dict[str, Accumulator]:
        return {
            key: Accumulator(kind, torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
            for key, (kind, total, count) in metrics.items()
        }

    merged = merge_metrics([accumulators(part) for part in parts])
    assert merged.keys() == one.keys(), case
    for key, (kind, total, count) in one.items():
        assert merged[key].kind == kind
        assert float(merged[key].total) == pytest.approx(total, rel=1e-6, abs=1e-9), (case, key)
        # A count of tokens is exact; what a ratio divides by is a sum of its own.
        assert float(merged[key].count) == pytest.approx(count, rel=1e-7), (case, key)


def test_the_cases_reach_the_sequence_drop():
    dropped = {
        seed: float(policy_loss(on_rank(pack, 1, 0), LOSSES["token mean"]).metrics[DROPPED].total)
        for seed, pack in ((seed, whole_pack(seed, spread)) for _, (seed, spread) in CASES)
    }
    assert dropped[0] == dropped[1] == 0
    assert dropped[2] + dropped[3] > 0
    assert dropped[TWO_CLIPPED_TOKENS] == 1


@pytest.mark.parametrize("cp_size", [2, 4])
def test_no_rank_alone_could_decide_the_planted_drop(cp_size):
    pack = whole_pack(TWO_CLIPPED_TOKENS, 0.0)
    clipped = pack.log_probs - pack.old_log_probs > 2.0
    shards = [PackLayout(pack.layout.padded_lengths, cp_size, rank).shard(clipped) for rank in range(cp_size)]
    assert int(clipped.sum()) == 2
    assert max(int(shard.sum()) for shard in shards) == 1
