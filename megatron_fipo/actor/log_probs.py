"""Per-token log-probabilities and entropy from the last hidden states and a vocabulary-parallel output matrix.

Shapes: n tokens that count, h hidden size, V vocabulary size, W tensor-parallel ranks, each with V/W rows of the output
matrix. Only tokens that count are multiplied by the matrix at all, in chunks, and one copy of their logits in the
compute dtype is kept for the backward pass, which turns it into the gradient in place. With `recompute_logits` not
even that copy is kept. Exponentials are float32 and live for a few rows at a time: a small part of that copy.

What there is one of per token is float64: a float32 log-probability near −6 is rounded by 2e-7, and the Future-KL adds
up dozens of such roundings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Tokens per chunk: rows that one matrix product and its two all-reduces cover.
DEFAULT_CHUNK_TOKENS = 1024
# Two float32 temporaries at a time may take this part of the logits' one copy, or these many entries if that is more.
_TEMPORARY_PART = 0.08
_MIN_TEMPORARY_ENTRIES = 2**18
# Columns whose exponentials are added in float32 before the float64 sum.
_SUM_COLUMNS = 128


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

    Beyond the inputs and their gradients, forward and backward need at most 1.1 copies of the logits [n, V/W] in the
    compute dtype; `recompute_logits` makes that chunk_tokens / n + 0.1 copies, and so does a call without gradient.
    (0.1 copies is at least the 2 MiB of two float32 temporaries.)

    Args:
        hidden: [n, h] compute dtype, the same on every rank of the group.
        weight: [V/W, h] compute dtype.
        targets: [n] int64.
        shard: This rank's part of the vocabulary.
        temperature: Divides the logits.
        chunk_tokens: Rows worked on at a time.
        recompute_logits: Compute the logits again in the backward pass instead of keeping them. The gradient of
            `weight` is then rounded to the compute dtype once a chunk.

    Returns:
        Log-probabilities [n] float64 with gradient, and entropies [n] float64, in nats, without.
    """
    # Asked here: inside the function gradients are always off, and it cannot tell whether one will be wanted.
    keep_logits = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad) and not recompute_logits
    log_probs, entropy = _LinearLogProbs.apply(hidden, weight, targets, shard, temperature, chunk_tokens, keep_logits)
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
        keep_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        log_probs = torch.empty(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        log_partition = torch.empty_like(log_probs)
        kept = hidden.new_empty(hidden.shape[0], weight.shape[0]) if keep_logits else None
        rows = _rows_at_a_time(hidden, weight)
        for chunk in _slices(hidden.shape[0], chunk_tokens):
            logits = torch.mm(hidden[chunk], weight.t(), out=None if kept is None else kept[chunk])
            log_probs[chunk], entropy[chunk], log_partition[chunk] = _chunk_statistics(
                logits, targets[chunk], shard, temperature, rows
            )
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, log_partition)
        ctx.kept = kept
        ctx.shard, ctx.temperature, ctx.chunk_tokens = shard, temperature, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_partition = ctx.saved_tensors
        # The kept copy becomes the gradient; a second backward pass computes the logits again.
        kept, ctx.kept = ctx.kept, None
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None if kept is not None else torch.zeros_like(weight)
        rows = _rows_at_a_time(hidden, weight)
        for chunk in _slices(hidden.shape[0], ctx.chunk_tokens):
            logits = kept[chunk] if kept is not None else torch.mm(hidden[chunk], weight.t())
            for part in _slices(logits.shape[0], rows):
                _to_gradient_(
                    logits[part],
                    targets[chunk][part],
                    log_partition[chunk][part],
                    gradients[0][chunk][part],
                    ctx.shard,
                    ctx.temperature,
                )
            torch.mm(logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), hidden[chunk])
            del logits
        if grad_weight is None:
            grad_weight = torch.mm(kept.t(), hidden)
        return grad_hidden, grad_weight, None, None, None, None, None


def _slices(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def _rows_at_a_time(hidden: Tensor, weight: Tensor) -> int:
    """Rows of logits that are turned to float32 at a time."""
    part_of_the_copy = int(hidden.shape[0] * _TEMPORARY_PART * hidden.itemsize / (2 * torch.float32.itemsize))
    return max(part_of_the_copy, _MIN_TEMPORARY_ENTRIES // weight.shape[0], 1)


def _chunk_statistics(
    logits: Tensor, targets: Tensor, shard: VocabularyShard, temperature: float, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and log-partition [n] of one chunk of logits [n, V/W], `rows` of them at a time."""
    real = logits[:, : _num_real_rows(logits, shard)]
    maximum = _largest_score(real, shard, temperature)
    sums = torch.zeros(3, logits.shape[0], dtype=torch.float64, device=logits.device)
    for part in _slices(logits.shape[0], rows):
        sums[0, part], sums[1, part] = _partition_sums(real[part], maximum[part], temperature)
    local, here = _local_targets(targets, real.shape[1], shard)
    if real.shape[1]:
        target_scores = real.gather(1, local[:, None]).squeeze(1).to(maximum.dtype) / temperature - maximum
        sums[2] = torch.where(here, target_scores, 0.0)
    if shard.group.size() > 1:
        dist.all_reduce(sums, group=shard.group)
    partition, weighted, target_score = sums
    log_partition = partition.log()
    return target_score - log_partition, log_partition - weighted / partition, log_partition + maximum


def _partition_sums(real: Tensor, maximum: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Per row [n] float64: Σ exp(s) and Σ s·exp(s), with s the score below the largest."""
    scores = real.to(maximum.dtype, copy=True).div_(temperature).sub_(maximum[:, None])
    exponentials = scores.exp()
    return _row_sums(exponentials), _row_sums(scores.mul_(exponentials))


def _num_real_rows(logits: Tensor, shard: VocabularyShard) -> int:
    """Rows of this rank's part of the vocabulary that are no padding."""
    return min(max(shard.vocab_size - shard.start, 0), logits.shape[1])


def _largest_score(real: Tensor, shard: VocabularyShard, temperature: float) -> Tensor:
    """[n] at least float32: the largest logit over the whole vocabulary, over temperature."""
    dtype = torch.promote_types(real.dtype, torch.float32)
    if real.shape[1]:
        maximum = real.amax(dim=-1).to(dtype) / temperature
    else:
        maximum = torch.full(real.shape[:1], float("-inf"), dtype=dtype, device=real.device)
    if shard.group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
    return maximum


def _row_sums(values: Tensor) -> Tensor:
    """Sums [n] float64 of rows [n, V/W], without the float64 copy of all values that a float64 sum would make."""
    blocks = values.shape[1] // _SUM_COLUMNS
    whole = values[:, : blocks * _SUM_COLUMNS].unflatten(1, (blocks, _SUM_COLUMNS))
    rest = values[:, blocks * _SUM_COLUMNS :]
    return whole.sum(dim=-1).sum(dim=-1, dtype=torch.float64) + rest.sum(dim=-1)


def _to_gradient_(
    logits: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    upstream: Tensor,
    shard: VocabularyShard,
    temperature: float,
) -> None:
    """Turn logits [n, V/W] into upstream / temperature · (1[target] − softmax), in place."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    num_real = _num_real_rows(logits, shard)
    logits[:, num_real:] = 0.0
    if num_real == 0:
        return
    real = logits[:, :num_real]
    factors = (upstream / temperature).to(dtype)
    scores = real.to(dtype).div_(temperature).sub_(log_partition.to(dtype)[:, None])
    scores.exp_().mul_(-factors[:, None])
    local, here = _local_targets(targets, num_real, shard)
    # One entry a row: reading and writing it is far faster on the CPU than scatter_add_.
    entries = scores.gather(1, local[:, None]) + torch.where(here, factors, 0.0)[:, None]
    scores.scatter_(1, local[:, None], entries)
    real.copy_(scores)


def _local_targets(targets: Tensor, rows: int, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Row of every target on this rank (0 where it lives elsewhere), and whether it lives here."""
    local = targets - shard.start
    here = (local >= 0) & (local < rows)
    return torch.where(here, local, 0), here
