"""Controls of the influence weights: what a comparison changes to ask whether FIPO's weights are what helps.

They look at whole responses, so under context parallelism each gathers a few numbers a token once more than FIPO does.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.future_kl.scan import segmented_reverse_sum
from megatron_fipo.algorithms.future_kl.segments import SegmentPlan, segment_plan
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.parallel.packs import gather_pack

VARIANCE_FLOOR = 1e-8
"""Added to every variance of `decay = variance`, in nats²; a median variance up to this counts as none."""


def shuffle_within_responses(
    weights: Tensor, mask: Tensor, sequence_numbers: Tensor, layout: PackLayout, group: dist.ProcessGroup | None
) -> Tensor:
    """Deal the weights of each response to its tokens anew.

    The order is a hash of the sequence's number and the token's position in it, so that no layout changes it.

    Args:
        weights: [t].
        mask: [t] bool, response tokens; the others keep their weight.
        sequence_numbers: [N] int64.
        layout: Where the tokens lie.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.

    Returns:
        [t], the dtype of `weights`.
    """
    whole = gather_pack(torch.stack([weights.double(), mask.double()], dim=1), layout, group)
    plan = segment_plan(layout.padded_lengths, weights.device)
    bins = 2 * plan.segment_ids + (whole[:, 1] == 0)
    in_order = bins.argsort(stable=True)
    positions = torch.arange(layout.num_tokens, device=weights.device) - plan.bounds[plan.segment_ids]
    by_key = _hash(sequence_numbers[plan.segment_ids], positions).argsort()
    dealt_to = by_key[bins[by_key].argsort(stable=True)]
    dealt = torch.empty_like(whole[:, 0])
    dealt[dealt_to] = whole[in_order, 0]
    dealt = torch.where(whole[:, 1] > 0, dealt, whole[:, 0])
    return layout.shard(dealt).to(weights.dtype)


def variance_decay(
    terms: Tensor,
    participates: Tensor,
    mask: Tensor,
    config: FipoConfig,
    layout: PackLayout,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Decay of every token by FIPO-K: γ_t = Q / (Q + R_t), within bounds, so that calm stretches reach further.

    R_t is the variance of M·Δ over the participating tokens among the next `variance_window_tokens` positions (over the
    whole response where fewer than two are left), and Q puts the median of each response at γ. Public code takes the
    median over a micro-batch, which depends on the packing. A response whose median variance is at most
    `VARIANCE_FLOOR` keeps γ throughout, where public code asks for zero: rounding must not decide.

    Args:
        terms: [t], M·Δ; zero where a token takes no part.
        participates: [t] bool, response tokens with M = 1.
        mask: [t] bool, response tokens.
        config: γ, window and bounds.
        layout: Where the tokens lie.
        group: The context-parallel group; may be None where `layout.cp_size` is 1.

    Returns:
        [t] float64; γ outside the response.
    """
    columns = torch.stack([terms.double(), participates.double(), mask.double()], dim=1)
    whole = gather_pack(columns, layout, group)
    plan = segment_plan(layout.padded_lengths, terms.device)
    variances = _variance_ahead(whole[:, 0], whole[:, 1], config.variance_window_tokens, plan)
    in_response = whole[:, 2] > 0
    medians = _medians(variances, in_response, plan)[plan.segment_ids]
    decay = 2.0 ** (-1.0 / config.decay_half_life_tokens)
    pull = decay * medians
    decays = (pull / (pull + (1 - decay) * variances)).clamp(config.variance_decay_low, config.variance_decay_high)
    decays = torch.where(in_response & (medians > 2 * VARIANCE_FLOOR), decays, decay)
    return layout.shard(decays)


def _hash(numbers: Tensor, positions: Tensor) -> Tensor:
    """Well-mixed int64 of two integers (the finaliser of SplitMix64, D. Steele et al., 2014); products wrap around."""
    mixed = numbers * (0x9E3779B97F4A7C15 - (1 << 64)) + positions * 0x632BE59BD9B4E019
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        mixed = (mixed ^ _shift_right(mixed, shift)) * factor
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift that fills with zeros, as on unsigned integers."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _variance_ahead(terms: Tensor, participates: Tensor, window: int, plan: SegmentPlan) -> Tensor:
    """Variance behind every token, plus its floor: [T] float64."""
    # Sums from each token to the end of its own sequence, so that no other sequence of the pack rounds them.
    moments = [participates, terms, terms.square()]
    onwards = torch.stack([segmented_reverse_sum(each, math.inf, plan) for each in moments], dim=1)
    onwards = torch.cat([onwards, onwards.new_zeros(1, 3)])
    ends = plan.bounds[1:][plan.segment_ids]
    first = torch.arange(1, terms.shape[0] + 1, device=terms.device)

    def from_token(token: Tensor) -> Tensor:
        return torch.where((token < ends)[:, None], onwards[torch.minimum(token, ends)], 0.0)

    # No window reaches further than the pack; a sum with a larger one could overflow.
    ahead = from_token(first) - from_token(first + min(window, terms.shape[0]))
    whole = onwards[plan.bounds[:-1]][plan.segment_ids]
    chosen = torch.where(ahead[:, :1] >= 2, ahead, whole)
    counts = chosen[:, 0].clamp(min=1)
    variances = chosen[:, 2] / counts - (chosen[:, 1] / counts).square()
    return variances.clamp(min=0) + VARIANCE_FLOOR


def _medians(values: Tensor, mask: Tensor, plan: SegmentPlan) -> Tensor:
    """Lower median of every sequence's marked values: [N]; arbitrary where it has none."""
    counts = torch.zeros(plan.bounds.shape[0] - 1, dtype=torch.int64, device=values.device)
    counts.index_add_(0, plan.segment_ids, mask.long())
    by_value = torch.where(mask, values, torch.inf).argsort()
    order = by_value[plan.segment_ids[by_value].argsort(stable=True)]
    in_order = torch.cat([values[order], values.new_zeros(1)])
    return in_order[plan.bounds[:-1] + (counts - 1).clamp(min=0) // 2]
