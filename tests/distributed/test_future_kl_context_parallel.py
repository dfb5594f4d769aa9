import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from megatron_fipo.algorithms.future_kl import context_parallel, reference
from megatron_fipo.algorithms.policy_loss import LossInputs, LossOutput, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig, GrpoConfig
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig
from megatron_fipo.parallel.layout import PackLayout, Scheme
from megatron_fipo.parallel.packs import gather_pack
from megatron_fipo.types import Accumulator, merge_metrics
from tests.distributed_helpers import run_distributed
from tests.host_waits import NoHostWaits

pytestmark = pytest.mark.distributed

DROPPED = "fipo/dropped_sequences"
HALF_LIVES = [0.5, 32.0, 256.0, math.inf]
# Ragged, with empty chunks and sequences shorter than 2 · cp_size; a padded pack; a single token; nothing at all.
PACKS = [(65, 16, 0, 1300, 2, 7, 33), (48, 16, 160), (1,), (0, 0)]
SCHEMES: tuple[Scheme, ...] = ("zigzag", "contiguous")
LOSS_SCHEMES: dict[int, Scheme] = {2: "contiguous", 4: "zigzag"}
"""How the losses' pack is cut, by the number of ranks."""

TIS = RolloutCorrectionConfig(kind="truncate", high=2.0)
ICEPOP = RolloutCorrectionConfig(kind="mask", low=0.95, high=1.05)
MASKED_RESPONSES = RolloutCorrectionConfig(kind="mask", level="sequence", low=0.999, high=1.001)
LOSSES: dict[str, AlgorithmConfig] = {
    "official-32b": FipoConfig.preset("official-32b"),
    "official-7b": FipoConfig.preset("official-7b", dual_clip=3.0),
    "token mean": FipoConfig.preset("official-7b", aggregation="token_mean", dual_clip=3.0),
    "sequence mean": FipoConfig.preset("official-7b", aggregation="sequence_mean", dual_clip=3.0),
    "paper-v1": FipoConfig.preset("paper-v1", decay_half_life_tokens=256.0),
    "paper-v2": FipoConfig.preset("paper-v2", rollout_correction=TIS),
    "masked tokens": FipoConfig.preset("official-7b", dual_clip=3.0, rollout_correction=ICEPOP),
    "masked responses": FipoConfig.preset("paper-v2", rollout_correction=MASKED_RESPONSES),
    "dapo": DapoConfig(),
    "dapo, official averaging": DapoConfig(aggregation="official_micro_batch"),
    "grpo": GrpoConfig(),
}


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What every rank of a group found, all cases in one launch."""
    return run_distributed(on_one_rank, request.param, request.param)


def on_one_rank(cp_size: int) -> dict[str, Any]:
    return {
        "scans": scans_on_one_rank(cp_size),
        "packs": packs_on_one_rank(cp_size),
        "losses": losses_on_one_rank(cp_size, LOSS_SCHEMES[cp_size]) if cp_size in LOSS_SCHEMES else [],
    }


def layouts_on_one_rank(cp_size: int) -> list[PackLayout]:
    return [PackLayout(lengths, cp_size, dist.get_rank(), scheme) for lengths in PACKS for scheme in SCHEMES]


def scans_on_one_rank(cp_size: int) -> list[dict[str, Any]]:
    results = []
    for layout, half_life, with_decay in itertools.product(layouts_on_one_rank(cp_size), HALF_LIVES, [False, True]):
        generator = torch.Generator().manual_seed(7)
        log_ratio = torch.randn(layout.num_tokens, generator=generator, dtype=torch.float64)
        clipped = torch.rand(layout.num_tokens, generator=generator) < 0.3
        decay = torch.rand(layout.num_tokens, generator=generator, dtype=torch.float64) if with_decay else None
        expected = layout.shard(reference.future_kl_by_recurrence(log_ratio, half_life, layout.cu_seqlens, decay))
        values = layout.shard(log_ratio).requires_grad_()
        with CommDebugMode() as communication, NoHostWaits():
            future_kl, counts = context_parallel.future_kl(
                values,
                half_life,
                layout,
                dist.group.WORLD,
                layout.shard(clipped),
                None if decay is None else layout.shard(decay),
            )
        results.append(
            {
                "case": (layout, half_life, with_decay),
                "error": float((future_kl - expected).abs().max()) if len(expected) else 0.0,
                "counts": counts.tolist(),
                "expected_counts": [int(part.sum()) for part in clipped.split(layout.padded_lengths)],
                "collectives": {str(name): count for name, count in communication.get_comm_counts().items()},
                "requires_grad": future_kl.requires_grad,
            }
        )
    return results


@pytest.mark.parametrize("ranks", [2, 4, 8], indirect=True)
def test_scan_across_ranks_equals_the_definition_with_one_all_gather(ranks):
    for rank in ranks:
        assert len(rank["scans"]) == len(PACKS) * len(SCHEMES) * len(HALF_LIVES) * 2
        for scan in rank["scans"]:
            assert scan["error"] < 1e-12, scan["case"]
            assert scan["counts"] == scan["expected_counts"], scan["case"]
            assert list(scan["collectives"].values()) == [1], scan["collectives"]
            assert "allgather" in next(iter(scan["collectives"]))
            assert not scan["requires_grad"]


def packs_on_one_rank(cp_size: int) -> list[dict[str, Any]]:
    results = []
    for layout, trailing, dtype in itertools.product(
        layouts_on_one_rank(cp_size), [(), (3,)], [torch.float32, torch.int64]
    ):
        whole = torch.arange(layout.num_tokens * math.prod(trailing)).reshape(-1, *trailing).to(dtype)
        values = layout.shard(whole)
        with CommDebugMode() as communication, NoHostWaits():
            gathered = gather_pack(values.requires_grad_(dtype.is_floating_point), layout, dist.group.WORLD)
        results.append(
            {
                "case": (layout, trailing, dtype),
                "equal": gathered.tolist() == whole.tolist() and gathered.dtype == dtype,
                "collectives": communication.get_total_counts(),
                "requires_grad": gathered.requires_grad,
            }
        )
    return results


@pytest.mark.parametrize("ranks", [2, 4, 8], indirect=True)
def test_a_gathered_pack_is_whole_and_in_order(ranks):
    for rank in ranks:
        for pack in rank["packs"]:
            assert pack["equal"], pack["case"]
            assert pack["collectives"] == 1, pack["case"]
            assert not pack["requires_grad"]


def test_a_group_that_does_not_fit_the_layout_is_refused():
    layout = PackLayout((8,), 2)
    for call in (
        lambda: gather_pack(torch.zeros(4), layout, None),
        lambda: context_parallel.future_kl(torch.zeros(4), 32.0, layout, None),
    ):
        with pytest.raises(ValueError, match="group = None: the layout has cp_size = 2; pass the context-parallel"):
            call()
    with pytest.raises(ValueError, match=r"values.shape\[0\] = 3: this rank holds 8 tokens"):
        gather_pack(torch.zeros(3), PackLayout((8,)), None)


TWO_CLIPPED_TOKENS = 4
"""Seed of the pack whose first sequence has two tokens beyond the dual clip, held by different ranks."""


def whole_pack(seed: int, spread: float) -> LossInputs:
    """The pack that the losses are compared on.

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


def on_rank(inputs: LossInputs, cp_size: int, cp_rank: int, scheme: Scheme = "zigzag") -> LossInputs:
    layout = PackLayout(inputs.layout.padded_lengths, cp_size, cp_rank, scheme)
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


def losses_on_one_rank(cp_size: int, scheme: Scheme = "zigzag") -> list[dict]:
    results = []
    for name, (seed, spread) in CASES:
        inputs = on_rank(whole_pack(seed, spread), cp_size, dist.get_rank() if cp_size > 1 else 0, scheme)
        group = dist.group.WORLD if cp_size > 1 else None
        with CommDebugMode() as communication:
            output = policy_loss(inputs, LOSSES[name], group)
            (gradient,) = torch.autograd.grad(output.numerator, inputs.log_probs)
        results.append({**plain(output, gradient), "collectives": communication.get_total_counts()})
    return results


@pytest.mark.parametrize("ranks", LOSS_SCHEMES, indirect=True)
def test_the_loss_does_not_depend_on_the_number_of_ranks(ranks):
    for index, ((name, (seed, spread)), one) in enumerate(zip(CASES, losses_on_one_rank(1), strict=True)):
        case = f"{name}, seed {seed}"
        parts = [rank["losses"][index] for rank in ranks]
        pack = whole_pack(seed, spread)
        layout = PackLayout(pack.layout.padded_lengths, len(ranks), scheme=LOSS_SCHEMES[len(ranks)])
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
        expected = int(isinstance(LOSSES[name], FipoConfig)) + int(name == "masked responses")
        assert all(part["collectives"] == expected for part in parts), case
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


@pytest.mark.parametrize(("name", "most"), [("masked tokens", 0.6), ("masked responses", 0.9)])
def test_the_cases_mask_some_tokens_and_not_others(name, most):
    pack = on_rank(whole_pack(1, 0.2), 1, 0)
    masked = policy_loss(pack, LOSSES[name]).metrics["train/rollout_corrected_fraction"]
    assert 0 < float(masked.total / masked.count) < most


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
