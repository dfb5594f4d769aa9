"""Which sequences share a pack, and which data-parallel rank gets it.

Packs are planned once per rollout and used by the old-log-probability pass and by every update, so that both see the
same kernels on the same shapes: otherwise the log-ratio of the first mini-batch would not be exactly zero.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.config.base import ConfigError
from megatron_fipo.parallel.layout import PackLayout, sequence_multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingRules:
    """What a legal pack looks like.

    Attributes:
        max_tokens: Token budget of one pack, padding included, over all context-parallel ranks.
        cp_size: Context-parallel size; every sequence is padded to a multiple of 2·cp_size when it exceeds 1.
        pack_multiple: Every pack's length is padded to a multiple of this.
        micro_batch_multiple: The micro-batch count is padded to a multiple of this (interleaved pipelines need the
            pipeline size).
    """

    max_tokens: int
    cp_size: int
    pack_multiple: int
    micro_batch_multiple: int = 1


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch: the sequences in it, in order, and their padded lengths.

    Attributes:
        sequences: Indices into the rollout batch; empty for a null micro-batch.
        padded_lengths: One per sequence, then one for the filler sequence where the pack needs one.
    """

    sequences: tuple[int, ...]
    padded_lengths: tuple[int, ...]

    def layout(self, cp_size: int, cp_rank: int) -> PackLayout:
        """Where this pack's tokens lie on a rank; lengths that attention cannot work on are refused."""
        layout = PackLayout(self.padded_lengths, cp_size, cp_rank)
        layout.require_equal_chunks()
        return layout


# packs[mini_batch][dp_rank] lists that rank's micro-batches; all ranks have the same number.
PackPlan = tuple[tuple[tuple[Pack, ...], ...], ...]


def plan_packs(
    sequence_lengths: Sequence[int], mini_batch_ids: Sequence[int], dp_size: int, rules: PackingRules
) -> PackPlan:
    """Plan every mini-batch of a rollout.

    Sequences go, longest first, into the emptiest pack under the token budget; the packs of a mini-batch are dealt
    to data-parallel ranks, heaviest first, each to the lightest rank with room. Every rank gets the same number;
    where sequences are too few for that, null micro-batches fill up.

    Args:
        sequence_lengths: [N] tokens of every sequence, without padding.
        mini_batch_ids: [N] which optimizer step each belongs to.
        dp_size: Number of data-parallel ranks.
        rules: What a legal pack looks like.

    Returns:
        packs[mini_batch][dp_rank]: micro-batches, of equal number over the ranks of a mini-batch.

    Raises:
        ConfigError: A sequence does not fit the token budget.
    """
    longest = max(sequence_lengths, default=0)
    if _padded(longest, rules) > _budget(rules):
        raise ConfigError(
            field="parallelism.max_tokens_per_micro_batch",
            value=rules.max_tokens,
            rule=f"must hold the longest sequence, {_padded(longest, rules)} tokens after padding",
            way_out=(
                f"raise it to at least {math.ceil(_padded(longest, rules) / rules.pack_multiple) * rules.pack_multiple}"
                " or shorten rollout.max_response_tokens"
            ),
        )
    num_mini_batches = max(mini_batch_ids, default=-1) + 1
    members: list[list[int]] = [[] for _ in range(num_mini_batches)]
    for index, mini_batch in enumerate(mini_batch_ids):
        members[mini_batch].append(index)
    return tuple(_plan_mini_batch(indices, sequence_lengths, dp_size, rules) for indices in members)


def _padded(length: int, rules: PackingRules) -> int:
    multiple = sequence_multiple(rules.cp_size)
    return math.ceil(length / multiple) * multiple


def _budget(rules: PackingRules) -> int:
    """Tokens that sequences may fill, so that padding the pack cannot pass the limit."""
    return rules.max_tokens // rules.pack_multiple * rules.pack_multiple


def _plan_mini_batch(
    indices: Sequence[int], sequence_lengths: Sequence[int], dp_size: int, rules: PackingRules
) -> tuple[tuple[Pack, ...], ...]:
    by_length = sorted(indices, key=lambda index: (-sequence_lengths[index], index))
    bins = _fill_bins(by_length, sequence_lengths, dp_size * rules.micro_batch_multiple, rules)
    packs = [_make_pack(sorted(members), sequence_lengths, rules) for members in bins if members]
    count = len(bins) // dp_size
    loads = [0] * dp_size
    shares: list[list[Pack]] = [[] for _ in range(dp_size)]
    for pack in sorted(packs, key=lambda pack: (-sum(pack.padded_lengths), pack.sequences)):
        open_ranks = [rank for rank in range(dp_size) if len(shares[rank]) < count]
        rank = min(open_ranks, key=lambda rank: (loads[rank], rank))
        shares[rank].append(pack)
        loads[rank] += sum(pack.padded_lengths)
    null = Pack((), (max(rules.pack_multiple, sequence_multiple(rules.cp_size)),))
    return tuple(tuple(share + [null] * (count - len(share))) for share in shares)


def _fill_bins(
    by_length: Sequence[int], sequence_lengths: Sequence[int], count_multiple: int, rules: PackingRules
) -> list[list[int]]:
    """Longest first, each into the emptiest bin; the fewest bins that hold all, in multiples of `count_multiple`.

    Without the multiple some rank would get a pack more than another, and wait for it with a null micro-batch.
    """
    needs = [_padded(sequence_lengths[index], rules) for index in by_length]
    budget = _budget(rules)
    count = max(math.ceil(sum(needs) / budget / count_multiple), 1) * count_multiple
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, place) for place in range(count)]
        for index, need in zip(by_length, needs, strict=True):
            load, place = emptiest[0]
            if load + need > budget:
                break
            bins[place].append(index)
            heapq.heapreplace(emptiest, (load + need, place))
        else:
            return bins
        count += count_multiple


def _make_pack(sequences: Sequence[int], sequence_lengths: Sequence[int], rules: PackingRules) -> Pack:
    lengths = [_padded(sequence_lengths[index], rules) for index in sequences]
    filler = -sum(lengths) % rules.pack_multiple
    return Pack(tuple(sequences), tuple([*lengths, filler] if filler else lengths))
