"""Transformer parts for ranks without Transformer Engine, in plain PyTorch.

megatron-core's own local attention refuses packed sequences and context parallelism, and its torch norm refuses
sequence parallelism. Transformer Engine does both on CUDA; these classes do both everywhere, with the same zigzag
layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fipo.parallel.layout import PackLayout

# Sequences share one attention call while the shortest is at least this part of the longest.
_MIN_LENGTH_RATIO = 0.75


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked so that megatron-core sums its gradient over the sequence-parallel ranks.

    Args:
        config: The model's configuration.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _AttentionBucket:
    """Sequences of similar length, attended to in one call.

    Attributes:
        query_rows: [n, Lq] int64 into the local tokens; a repeated last row fills short sequences.
        key_rows: [n, Lk] int64 into the gathered tokens, in order of position.
        keep: [n or 1, 1, Lq, Lk] bool, or None where plain causal masking says the same.
        valid: [sum of lengths] int64: the rows of the flattened output that are real.
    """

    query_rows: Tensor
    key_rows: Tensor
    keep: Tensor | None
    valid: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """How one pack's tokens are grouped for attention on this rank.

    Attributes:
        buckets: Groups of sequences of similar length.
        order: [T / C] int64: row of the buckets' joined outputs for every local token, None when already in order.
    """

    buckets: tuple[_AttentionBucket, ...]
    order: Tensor | None


@dataclass
class LocalPackedSeqParams(PackedSeqParams):
    """Packed-sequence parameters that also carry the plan of `PackedDotProductAttention`."""

    plan: AttentionPlan | None = None


@lru_cache(maxsize=256)
def attention_plan(layout: PackLayout) -> AttentionPlan:
    """Group a pack's sequences for attention; depends on the lengths alone."""
    layout.require_equal_chunks()
    gathered_row = torch.empty(layout.num_tokens, dtype=torch.int64)
    everyone = torch.cat([layout.on_rank(rank).local_indices for rank in range(layout.cp_size)])
    gathered_row[everyone] = torch.arange(layout.num_tokens)
    by_length = sorted(range(layout.num_sequences), key=lambda index: -layout.padded_lengths[index])
    groups: list[list[int]] = []
    for index in by_length:
        if groups and layout.padded_lengths[index] >= _MIN_LENGTH_RATIO * layout.padded_lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    buckets = tuple(_bucket(layout, sorted(group), gathered_row) for group in groups)
    rows = torch.cat([bucket.query_rows.reshape(-1)[bucket.valid] for bucket in buckets])
    in_order = bool(torch.equal(rows, torch.arange(len(rows))))
    return AttentionPlan(buckets, None if in_order else torch.argsort(rows))


def _bucket(layout: PackLayout, sequences: Sequence[int], gathered_row: Tensor) -> _AttentionBucket:
    lengths = [layout.padded_lengths[index] for index in sequences]
    starts = [int(layout.cu_seqlens[index]) for index in sequences]
    longest, local_longest = max(lengths), max(lengths) // layout.cp_size
    query_rows, key_rows, valid = [], [], []
    for place, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        local = length // layout.cp_size
        first = start // layout.cp_size
        query_rows.append(first + torch.arange(local_longest).clamp(max=local - 1))
        key_rows.append(gathered_row[start + torch.arange(longest).clamp(max=length - 1)])
        valid.append(place * local_longest + torch.arange(local))
    queries = torch.stack(query_rows)
    keep = None
    if layout.cp_size > 1:
        # A padded key position equals no real query's position or lies after it, so causal order masks it too.
        query_positions = layout.local_positions[queries]
        if len(set(lengths)) == 1:
            query_positions = query_positions[:1]
        keep = (query_positions[:, :, None] >= torch.arange(longest)[None, None, :]).unsqueeze(1)
    return _AttentionBucket(queries, torch.stack(key_rows), keep, torch.cat(valid))


class PackedDotProductAttention(MegatronModule):
    """Causal attention over a pack, exact under context parallelism.

    Every rank gathers keys and values of the whole pack (backward: reduce-scatter), the scheme that Transformer Engine
    calls `cp_comm_type="all_gather"`, and attends from its own zigzag tokens.

    Args:
        config: The model's configuration; attention dropout and sliding windows are refused.
        layer_number: Place of the layer, from 1.
        softmax_scale: Factor on the scores; by default 1/√(head size).
        pg_collection: Process groups, of which the context-parallel one is used.

    Raises:
        ValueError: The configuration asks for attention dropout or a sliding window.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: Any = None,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout = {dropout}: the local attention has none; set it to 0")
        if config.window_size is not None:
            raise ValueError(f"window_size = {config.window_size}: the local attention is full; set it to null")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: LocalPackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within every sequence of the pack.

        Args:
            query: [T / C, heads, head size].
            key: [T / C, KV heads, head size].
            value: [T / C, KV heads, head size].
            attention_mask: Unused: the mask follows from the plan.
            attn_mask_type: Unused: always causal within a sequence.
            attention_bias: Unused.
            packed_seq_params: Carries the attention plan.

        Returns:
            [T / C, heads, head size].

        Raises:
            ValueError: The batch is not packed.
        """
        if packed_seq_params is None or packed_seq_params.plan is None:
            raise ValueError("packed_seq_params = None: the local attention takes packed (thd) batches only")
        plan = packed_seq_params.plan
        if self.cp_group.size() > 1:
            gathered = gather_from_sequence_parallel_region(
                torch.cat([key, value], dim=-1).contiguous(),
                tensor_parallel_output_grad=True,
                group=self.cp_group,
            )
            key, value = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)
        outputs = [self._attend(query, key, value, bucket) for bucket in plan.buckets]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined if plan.order is None else joined.index_select(0, plan.order.to(joined.device))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: _AttentionBucket) -> Tensor:
        queries = _rows(query, bucket.query_rows)
        output = F.scaled_dot_product_attention(
            queries,
            _rows(key, bucket.key_rows),
            _rows(value, bucket.key_rows),
            attn_mask=None if bucket.keep is None else bucket.keep.to(query.device),
            is_causal=bucket.keep is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        flat = output.transpose(1, 2).reshape(-1, *query.shape[1:])
        valid = bucket.valid.to(flat.device)
        return flat if len(valid) == len(flat) else flat.index_select(0, valid)


def _rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows of [t, heads, size] as [n, heads, L, size]."""
    picked = tokens.index_select(0, rows.reshape(-1).to(tokens.device))
    return picked.view(*rows.shape, *tokens.shape[1:]).transpose(1, 2)
