"""Factors on token losses against the mismatch of trainer and rollout engine: truncated (TIS) or masked (MIS, IcePop).

The engine samples from π_rollout, the loss takes expectations over π_old: k = π_old / π_rollout makes up for it. Both
kinds bound the factor, and with it the variance. The loss is divided as without them: a masked token is one whose
factor is 0, as in IcePop's objective, which divides by the length of the whole response (arXiv:2510.18855), and D is
known before the first forward pass. (Leaving masked tokens out of D, as rejection sampling does, would stretch the
step where the mismatch is large.)
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.aggregation import SequenceCounts
from megatron_fipo.algorithms.sequence_means import sequence_means
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig
from megatron_fipo.parallel.layout import PackLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCorrection:
    """What a correction does on one rank's tokens; arbitrary where no response token is.

    Attributes:
        factors: [t] without gradient; NaN where a log-probability is.
        acted: [t] bool, whether a bound has cut the factor off.
    """

    factors: Tensor
    acted: Tensor


def rollout_correction(
    log_ratio: Tensor,
    mask: Tensor,
    sequences: SequenceCounts,
    layout: PackLayout,
    group: dist.ProcessGroup | None,
    config: RolloutCorrectionConfig,
) -> RolloutCorrection:
    """Bounded factors of a micro-batch; with `level = sequence` one all-reduce of 8·N bytes in `group`.

    Args:
        log_ratio: [t], log π_old − log π_rollout, zero outside `mask`.
        mask: [t] bool, response tokens that count.
        sequences: Per-sequence counts.
        layout: Where the tokens lie.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.
        config: Kind, level and bounds; the kind is not "none".
    """
    assert config.kind != "none", "there are no factors"
    if config.level == "sequence":
        log_ratio = sequence_means(log_ratio, mask, sequences, layout, group)
    ratio = log_ratio.exp()
    beyond = ratio > config.high
    if config.kind == "truncate":
        return RolloutCorrection(factors=ratio.clamp(max=config.high), acted=beyond)
    beyond = beyond | (ratio < config.low)
    return RolloutCorrection(factors=ratio.masked_fill(beyond, 0.0), acted=beyond)
