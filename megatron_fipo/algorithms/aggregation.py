"""Averaging token losses, as a local numerator and a local count.

The loss of a mini-batch is Σ numerators / Σ denominators, both summed over its micro-batches and over the
data- and context-parallel ranks. Nothing is divided before that, except inside the terms that a mode defines
by a mean.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fipo.config.policy_gradient import PolicyGradientConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCounts:
    """What is known of every sequence of a micro-batch; the same on all context-parallel ranks.

    Attributes:
        sequence_ids: [t] int64, the sequence of every local token.
        response_lengths: [N] int64, response tokens of the whole sequence; 0 for filler.
        dropped: [N] bool, sequences taken out by the sequence drop.
        counted_here: Whether this rank counts sequences; true on one rank of a context-parallel group.
    """

    sequence_ids: Tensor
    response_lengths: Tensor
    dropped: Tensor
    counted_here: bool

    def dropping(self, dropped: Tensor) -> "SequenceCounts":
        """The same with these sequences [N] bool taken out."""
        return replace(self, dropped=dropped)


def aggregate(
    token_losses: Tensor, kept_mask: Tensor, sequences: SequenceCounts, config: PolicyGradientConfig
) -> tuple[Tensor, Tensor]:
    """Unnormalised sum and count of one micro-batch on one rank.

    Args:
        token_losses: [t] with gradient; zero where a token does not count.
        kept_mask: [t] bool, response tokens of sequences that are not dropped.
        sequences: Per-sequence counts.
        config: Its `aggregation` says how. `token_mean`: sum over tokens, count of kept tokens. `sequence_mean`: sum
            of losses over their sequence's length, count of kept sequences. `sequence_sum`: sum of losses over
            `length_divisor`, count of kept sequences. `official_micro_batch`: mean over the micro-batch's kept tokens
            times its number of samples, count of samples (dropped ones too).

    Returns:
        Numerator, 0-dim float64 with gradient, and denominator, 0-dim int64.
    """
    lengths = sequences.response_lengths
    kept_lengths = torch.where(sequences.dropped, 0, lengths)
    if config.aggregation == "token_mean":
        return token_losses.sum(dtype=torch.float64), kept_mask.sum()
    if config.aggregation == "sequence_sum":
        assert config.length_divisor is not None, "the configuration checks it"
        return token_losses.sum(dtype=torch.float64) / config.length_divisor, _count(kept_lengths, sequences)
    if config.aggregation == "sequence_mean":
        weights = 1.0 / lengths.clamp(min=1).to(token_losses.dtype)
        numerator = (token_losses * weights[sequences.sequence_ids]).sum(dtype=torch.float64)
        return numerator, _count(kept_lengths, sequences)
    num_samples = (lengths > 0).sum()
    mean = token_losses.sum(dtype=torch.float64) / kept_lengths.sum().clamp(min=1)
    return mean * num_samples, _count(lengths, sequences)


def _count(lengths: Tensor, sequences: SequenceCounts) -> Tensor:
    counted = (lengths > 0).sum()
    return counted if sequences.counted_here else torch.zeros_like(counted)
