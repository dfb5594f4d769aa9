"""Baselines and controls on 2 and 4 context-parallel ranks, zigzag and contiguous: the numbers of one rank.

In float64 sums, denominators and gradients agree to 1e-12, clip decisions and metrics that count exactly.
"""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from megatron_fipo.algorithms.policy_loss import LossInputs, LossOutput, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import (
    CispoConfig,
    DapoConfig,
    DrGrpoConfig,
    GmpoConfig,
    GrpoConfig,
    GspoConfig,
    SapoConfig,
)
from megatron_fipo.parallel.layout import PackLayout, Scheme
from megatron_fipo.types import Metrics, merge_metrics, render_metrics
from tests.distributed_helpers import run_distributed

pytestmark = pytest.mark.distributed

ALL_REDUCE, ALL_GATHER = "c10d.allreduce_", "c10d._allgather_base_"
WIDE: dict[str, Any] = {"influence_clip_low": 0.5, "influence_clip_high": 2.0, "dual_clip": 4.0}
WITH_REFERENCE: dict[str, Any] = {"reference_kl_coefficient": 0.1}
ALL_CONTROLS: dict[str, Any] = {
    "influence": "shuffled",
    "decay": "variance",
    "variance_window_tokens": 8,
    "include_current_token": False,
    "self_normalize": True,
}
ALGORITHMS: dict[str, tuple[AlgorithmConfig, dict[str, int]]] = {
    "grpo, k1": (GrpoConfig(**WITH_REFERENCE, reference_kl_estimator="k1"), {}),
    "dapo, k2": (DapoConfig(**WITH_REFERENCE, reference_kl_estimator="k2"), {}),
    "dr_grpo": (DrGrpoConfig(length_divisor=64), {}),
    "gspo": (GspoConfig(), {ALL_REDUCE: 1}),
    "gspo, k3": (GspoConfig(clip_low=0.01, clip_high=0.01, dual_clip=1.02, **WITH_REFERENCE), {ALL_REDUCE: 1}),
    "gmpo": (GmpoConfig(), {ALL_REDUCE: 1}),
    "cispo": (CispoConfig(weight_low=0.5, weight_high=2.0), {}),
    "sapo": (SapoConfig(), {}),
    "fipo, constant": (FipoConfig(influence="constant", constant_influence=1.1, **WIDE), {ALL_GATHER: 1}),
    "fipo, exclusive": (FipoConfig(include_current_token=False, **WIDE), {ALL_GATHER: 1}),
    "fipo, self-normalised": (FipoConfig(self_normalize=True, **WIDE), {ALL_GATHER: 1}),
    "fipo, shuffled": (FipoConfig(influence="shuffled", **WIDE), {ALL_GATHER: 2}),
    "fipo, variance": (FipoConfig(decay="variance", **WIDE), {ALL_GATHER: 2}),
    "fipo, all controls": (FipoConfig(**ALL_CONTROLS, **WIDE, **WITH_REFERENCE), {ALL_GATHER: 3}),
}
"""Every configuration, with the collectives that it runs under context parallelism."""

SCHEMES: tuple[Scheme, ...] = ("zigzag", "contiguous")
CASES = list(itertools.product(ALGORITHMS, SCHEMES))
PER_TOKEN = ("old_log_probs", "advantages", "response_mask", "reference_log_probs")


def whole_pack(name: str) -> LossInputs:
    """Responses that no chunk size divides, in one chunk, in one token, in several spans; and filler.

    The ratios are spread widely, or for GSPO's narrow clip narrowly.
    """
    narrow = name == "gspo"
    lengths = (157, 64, 9, 24, 131, 1)
    spans = {0: [(10, 150)], 1: [(1, 8)], 2: [(8, 9)], 4: [(5, 30), (40, 41), (60, 131)], 5: [(0, 1)]}
    layout = PackLayout(lengths)
    draws = torch.Generator().manual_seed(3)
    mask = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for index, parts in spans.items():
        for start, end in parts:
            mask[int(layout.cu_seqlens[index]) + start : int(layout.cu_seqlens[index]) + end] = True

    def noise() -> torch.Tensor:
        return torch.randn(layout.num_tokens, generator=draws, dtype=torch.float64)

    old = -noise().abs()
    shift = (3e-3 if narrow else 0.5) * noise()
    if not narrow:
        # Of one response, in chunks of different ranks: two tokens beyond the dual clip, which drop it together.
        shift[[20, 100]] = math.log(6.0)
    advantages = torch.tensor([-0.7, 1.1, -0.4, 0.3, 0.6, 1.0], dtype=torch.float64)
    return LossInputs(
        log_probs=(old + shift).masked_fill(~mask, math.nan),
        old_log_probs=old.masked_fill(~mask, math.nan),
        advantages=advantages[layout.local_sequence_ids].masked_fill(~mask, math.nan),
        response_mask=mask,
        response_lengths=torch.tensor([int(part.sum()) for part in mask.split(lengths)]),
        layout=layout,
        reference_log_probs=(old + 0.2 * noise()).masked_fill(~mask, math.nan),
        sequence_numbers=torch.tensor([40, 7, 1, 99, 3, 12]),
    )


def on_rank(pack: LossInputs, layout: PackLayout) -> LossInputs:
    parts = {name: layout.shard(getattr(pack, name)) for name in PER_TOKEN}
    log_probs = layout.shard(pack.log_probs).clone().requires_grad_()
    return dataclasses.replace(pack, layout=layout, log_probs=log_probs, **parts)


def plain(output: LossOutput, gradient: torch.Tensor) -> dict[str, Any]:
    """What a rank reports, without the graph."""
    return {
        "numerator": output.numerator.detach(),
        "denominator": output.denominator,
        "gradient": gradient,
        "influence_weights": output.influence_weights,
        "future_kl": output.future_kl,
        "kept_mask": output.kept_mask,
        "metrics": output.metrics,
    }


def losses_on_one_rank(cp_size: int) -> list[dict[str, Any]]:
    rank = dist.get_rank() if cp_size > 1 else 0
    results = []
    for name, scheme in CASES:
        pack = whole_pack(name)
        inputs = on_rank(pack, PackLayout(pack.layout.padded_lengths, cp_size, rank, scheme))
        with CommDebugMode() as communication:
            output = policy_loss(inputs, ALGORITHMS[name][0], dist.group.WORLD if cp_size > 1 else None)
            (gradient,) = torch.autograd.grad(output.numerator, inputs.log_probs)
        counts = {str(kind): count for kind, count in communication.get_comm_counts().items()}
        results.append({**plain(output, gradient), "collectives": counts})
    return results


@pytest.fixture(scope="module")
def one_rank() -> list[dict[str, Any]]:
    return losses_on_one_rank(1)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_ranks_together_give_the_numbers_of_one(cp_size: int, one_rank: list[dict[str, Any]]) -> None:
    ranks = run_distributed(losses_on_one_rank, cp_size, cp_size)
    for index, ((name, scheme), one) in enumerate(zip(CASES, one_rank, strict=True)):
        case = f"{name}, {scheme}"
        parts = [rank[index] for rank in ranks]
        layout = PackLayout(whole_pack(name).layout.padded_lengths, cp_size, 0, scheme)
        for key in ("numerator", "denominator"):
            total = float(sum(part[key] for part in parts))
            assert total == pytest.approx(float(one[key]), rel=1e-12, abs=1e-13), (case, key)
        for key in ("gradient", "influence_weights", "future_kl"):
            joined = layout.unshard([part[key] for part in parts])
            torch.testing.assert_close(joined, one[key], rtol=1e-12, atol=1e-13, msg=f"{case}: {key}")
        assert torch.equal(layout.unshard([part["kept_mask"] for part in parts]), one["kept_mask"]), case
        assert_metrics_agree([part["metrics"] for part in parts], one["metrics"], case)
        assert all(part["collectives"] == ALGORITHMS[name][1] for part in parts), (case, parts[0]["collectives"])
        assert one["collectives"] == {}, case


def assert_metrics_agree(parts: list[Metrics], one: Metrics, case: str) -> None:
    merged, whole = (render_metrics(metrics) for metrics in (merge_metrics(parts), one))
    assert merged.keys() == whole.keys(), case
    for key, value in whole.items():
        tolerance = 0.0 if "fraction" in key or "count" in key or key.endswith("dropped_sequences") else 1e-9
        assert merged[key] == pytest.approx(value, rel=tolerance, abs=tolerance / 1000), (case, key)


def test_the_cases_reach_clips_and_drops(one_rank: list[dict[str, Any]]) -> None:
    rendered = {name: render_metrics(one["metrics"]) for (name, _), one in zip(CASES, one_rank, strict=True)}
    for name in ("grpo, k1", "gspo", "gspo, k3", "gmpo", "cispo"):
        assert 0 < rendered[name]["train/clip_fraction_high"] < 1, name
        assert 0 < rendered[name]["train/clip_fraction_low"] < 1, name
    assert rendered["gspo, k3"]["fipo/dual_clip_fraction"] > 0
    assert rendered["fipo, all controls"]["fipo/dropped_sequences"] == 1
