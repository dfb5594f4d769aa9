"""Attention over a pack, shared by 1, 2 and 4 ranks, against each sequence on its own."""

import itertools
import math
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fipo.actor.local_layers import LocalPackedSeqParams, PackedDotProductAttention, attention_plan
from megatron_fipo.parallel.layout import PackLayout
from tests.distributed_helpers import run_distributed

pytestmark = pytest.mark.distributed

HEADS, HEAD_SIZE = 4, 8
KV_HEADS = [4, 2, 1]

# Multiples of 8, so that every pack fits 1, 2 and 4 ranks.
PACKS = {
    "one sequence": (48,),
    "equal lengths": (16, 16, 16),
    "similar lengths, attended to in one call": (64, 48, 56),
    "ragged": (8, 64, 16, 24, 56, 8, 120),
    "short before long": (8, 40),
}
# What only a single rank can hold.
ODD_PACKS = {"odd lengths": (1, 5, 13, 12, 2, 1, 30)}


def config(num_kv_heads: int = HEADS, **options: Any) -> TransformerConfig:
    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HEADS * HEAD_SIZE,
            "num_attention_heads": HEADS,
            "num_query_groups": num_kv_heads,
            "attention_dropout": 0.0,
            **options,
        }
    )


def attention(num_kv_heads: int = HEADS, **options: Any) -> PackedDotProductAttention:
    return PackedDotProductAttention(
        config(num_kv_heads, **options), layer_number=1, pg_collection=ProcessGroupCollection(cp=dist.group.WORLD)
    )


def draw_pack(num_tokens: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(num_tokens, heads, HEAD_SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, num_kv_heads, num_kv_heads, HEADS)
    )


def sequence_by_sequence(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        k, v = (each.repeat_interleave(HEADS // each.shape[1], dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD_SIZE)
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(diagonal=1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def errors_on_a_rank(packs: dict[str, tuple[int, ...]]) -> dict[str, dict[str, float]]:
    """Per case: largest error of the output and of the gradients on this rank."""
    # Memory that was never written reads as NaN.
    torch.use_deterministic_algorithms(True)
    errors = {}
    for (name, lengths), num_kv_heads in itertools.product(packs.items(), KV_HEADS):
        layout = PackLayout(lengths, dist.get_world_size(), dist.get_rank())
        *whole, upstream = draw_pack(layout.num_tokens, num_kv_heads)
        leaves = [each.clone().requires_grad_() for each in whole]
        reference = sequence_by_sequence(*leaves, lengths)
        expected = [reference.detach(), *torch.autograd.grad(reference, leaves, upstream)]

        local = [layout.shard(each).clone().requires_grad_() for each in whole]
        starts = layout.cu_seqlens
        parameters = LocalPackedSeqParams(
            qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, plan=attention_plan(layout)
        )
        output = attention(num_kv_heads)(*local, packed_seq_params=parameters)
        actual = [output.detach(), *torch.autograd.grad(output, local, layout.shard(upstream))]
        errors[f"{name}, {num_kv_heads} KV heads"] = {
            what: float((mine - layout.shard(theirs)).abs().max())
            for what, mine, theirs in zip(("output", "query", "key", "value"), actual, expected, strict=True)
        }
    return errors


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_output_and_gradients_equal_attention_sequence_by_sequence(cp_size):
    packs = PACKS | ODD_PACKS if cp_size == 1 else PACKS
    for errors in run_distributed(errors_on_a_rank, cp_size, packs):
        assert len(errors) == len(packs) * len(KV_HEADS)
        for case, case_errors in errors.items():
            assert max(case_errors.values()) <= 1e-12, (case, case_errors)


def test_similar_lengths_share_a_call():
    calls = {name: len(attention_plan(PackLayout(lengths)).buckets) for name, lengths in PACKS.items()}
    assert calls == {
        "one sequence": 1,
        "equal lengths": 1,
        "similar lengths, attended to in one call": 1,
        "ragged": 5,  # 120 | 64 56 | 24 | 16 | 8 8
        "short before long": 2,
    }


def refusals() -> list[str]:
    messages = []
    for build in (lambda: attention(attention_dropout=0.1), lambda: attention(window_size=(3, 0))):
        with pytest.raises(ValueError) as caught:
            build()
        messages.append(str(caught.value))
    query, key, value, _ = draw_pack(8, HEADS)
    with pytest.raises(ValueError) as caught:
        attention()(query, key, value)
    return [*messages, str(caught.value)]


def test_what_it_cannot_do_is_refused():
    assert run_distributed(refusals, 1) == [
        [
            "attention_dropout = 0.1: the local attention has none; set it to 0",
            "window_size = (3, 0): the local attention is full; set it to null",
            "packed_seq_params = None: the local attention takes packed (thd) batches only",
        ]
    ]
