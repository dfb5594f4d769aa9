"""Per-token log-probabilities and entropy from the last hidden states and a vocabulary-parallel output matrix.

Shapes: n tokens that count, h hidden size, V vocabulary size, W tensor-parallel ranks, each with V/W rows of the output
matrix. Only tokens that count are multiplied by the matrix at all, in chunks, and one copy of their logits in the
compute dtype is kept for the backward pass, which turns it into the gradient in place. With `recompute_logits` not
even that copy is kept.

What there is one of per token is float64: a float32 log-probability near −6 is rounded by 2e-7, and the Future-KL adds
up dozens of such roundings.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Tokens per chunk: float32 temporaries are this many rows of the logits.
DEFAULT_CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyShard:
    """This rank's part of the vocabulary.

    Attributes:
        start: First token id of this rank's rows.
        vocab_size: Tokens of the vocabulary without padding rows; padding rows never get probability.
        group: Tensor-parallel group.
    """

    start: int
    vocab_size: int
    group: dist.ProcessGroup


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    recompute_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, softmax(hidden · weightᵀ / temperature).

    Two all-reduces of the tensor-parallel group per chunk (the maximum, then three sums); none in the backward pass,
    whose gradient of `hidden` is this rank's part of a sum over the group.

    Args:
        hidden: [n, h] compute dtype, the same on every rank of the group.
        weight: [V/W, h] compute dtype.
        targets: [n] int64.
        shard: This rank's part of the vocabulary.
        temperature: Divides the logits.
        chunk_tokens: Rows worked on at a time.
        recompute_logits: Compute the logits again in the backward pass instead of keeping them.

    Returns:
        Log-probabilities [n] float64 with gradient, and entropies [n] float64, in nats, without.
    """
    log_probs, entropy = _LinearLogProbs.apply(
        hidden, weight, targets, shard, temperature, chunk_tokens, recompute_logits
    )
    return log_probs, entropy


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        temperature: float,
        chunk_tokens: int,
        recompute_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = weight.shape[0]
        keep_logits = (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]) and not recompute_logits
        log_probs = torch.empty(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        log_partition = torch.empty_like(log_probs)
        kept = hidden.new_empty(hidden.shape[0], rows) if keep_logits else None
        for begin in range(0, hidden.shape[0], chunk_tokens):
            part = slice(begin, min(begin + chunk_tokens, hidden.shape[0]))
            if kept is not None:
                logits = torch.mm(hidden[part], weight.t(), out=kept[part])
            else:
                logits = torch.mm(hidden[part], weight.t())
            scores = _scores(logits, shard, temperature)
            log_probs[part], entropy[part], log_partition[part] = _chunk_statistics(scores, targets[part], shard)
        ctx.save_for_backward(hidden, weight, targets, log_partition)
        ctx.kept = kept
        ctx.shard, ctx.temperature, ctx.chunk_tokens = shard, temperature, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_partition = ctx.saved_tensors
        upstream = gradients[0] / ctx.temperature
        kept, ctx.kept = ctx.kept, None
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None if kept is not None else torch.zeros_like(weight)
        for begin in range(0, hidden.shape[0], ctx.chunk_tokens):
            part = slice(begin, min(begin + ctx.chunk_tokens, hidden.shape[0]))
            logits = kept[part] if kept is not None else torch.mm(hidden[part], weight.t())
            scores = _scores(logits, ctx.shard, ctx.temperature)
            _to_gradient_(scores, targets[part], log_partition[part], upstream[part], ctx.shard)
            gradient = logits.copy_(scores)
            torch.mm(gradient, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(gradient.t(), hidden[part])
        if grad_weight is None:
            grad_weight = torch.mm(kept.t(), hidden)
        return grad_hidden, grad_weight, None, None, None, None, None


def _scores(logits: Tensor, shard: VocabularyShard, temperature: float) -> Tensor:
    """A new float32 tensor [n, V/W] of logits over temperature, −inf on padding rows of the vocabulary."""
    scores = logits.to(torch.float32, copy=True)
    if temperature != 1.0:
        scores.div_(temperature)
    real_rows = shard.vocab_size - shard.start
    if real_rows < scores.shape[1]:
        scores[:, max(real_rows, 0) :] = float("-inf")
    return scores


def _chunk_statistics(scores: Tensor, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and log-partition [n] of one chunk; overwrites `scores`."""
    maximum = scores.amax(dim=-1)
    if shard.group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
    local, here = _local_targets(targets, scores.shape[1], shard)
    target_score = torch.where(here, scores.gather(1, local[:, None]).squeeze(1) - maximum, 0.0)
    shifted = scores.sub_(maximum[:, None])
    exponentials = shifted.exp()
    # Padding rows have weight 0 and score −inf; their product must count as 0.
    weighted = torch.where(exponentials > 0, shifted, 0.0).mul_(exponentials).sum(dim=-1)
    sums = torch.stack([exponentials.sum(dim=-1, dtype=torch.float64), weighted.double(), target_score.double()])
    if shard.group.size() > 1:
        dist.all_reduce(sums, group=shard.group)
    partition, weighted, target_score = sums
    log_partition = partition.log()
    return target_score - log_partition, log_partition - weighted / partition, log_partition + maximum


def _to_gradient_(
    scores: Tensor, targets: Tensor, log_partition: Tensor, upstream: Tensor, shard: VocabularyShard
) -> None:
    """Turn scores [n, V/W] into upstream · (1[target] − softmax) in place."""
    factors = upstream.to(scores.dtype)
    scores.sub_(log_partition.to(scores.dtype)[:, None]).exp_().mul_(-factors[:, None])
    local, here = _local_targets(targets, scores.shape[1], shard)
    scores.scatter_add_(1, local[:, None], torch.where(here, factors, 0.0)[:, None])


def _local_targets(targets: Tensor, rows: int, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Row of every target on this rank (0 where it lives elsewhere), and whether it lives here."""
    local = targets - shard.start
    here = (local >= 0) & (local < rows)
    return torch.where(here, local, 0), here
