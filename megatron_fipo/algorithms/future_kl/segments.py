"""Where segments lie in a packed tensor, and how they are cut into blocks; all of it follows from their lengths.

A segment is what a sum runs over without a break: a sequence, or one chunk of it on a context-parallel rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from megatron_fipo.parallel.layout import copy_to

BLOCK = 32
"""Values of a block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentPlan:
    """Where S segments lie in a packed tensor of T values, and in M blocks; a function of the lengths alone.

    Attributes:
        lengths: Values of every segment; zero is allowed.
        device: Where the plan's tensors are.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def num_values(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def bounds(self) -> Tensor:
        """Starts of the segments, and the end of the last: [S + 1] int64."""
        return self._on_device([0, *accumulate(self.lengths)])

    @cached_property
    def segment_lengths(self) -> Tensor:
        """[S] int64."""
        return self._on_device(self.lengths)

    @cached_property
    def segment_ids(self) -> Tensor:
        """Every value's segment: [T] int64."""
        segments = torch.arange(len(self.lengths), device=self.device)
        return segments.repeat_interleave(self.segment_lengths, output_size=self.num_values)

    @cached_property
    def occupied(self) -> Tensor:
        """The segments that have values: [S'] int64."""
        return self._on_device([segment for segment, length in enumerate(self.lengths) if length])

    @cached_property
    def last_blocks(self) -> Tensor:
        """The last block of every segment that has values: [S'] int64."""
        ends = accumulate(self._block_counts)
        return self._on_device([end - 1 for end, length in zip(ends, self.lengths, strict=True) if length])

    @cached_property
    def last_slots(self) -> Tensor:
        """Place in the flattened blocks of the last value of every segment that has values: [S'] int64."""
        fills = [(length - 1) % BLOCK for length in self.lengths if length]
        return self.last_blocks * BLOCK + self._on_device(fills)

    @cached_property
    def blocks(self) -> "SegmentPlan | None":
        """Plan of the block heads, or None where no segment has two blocks."""
        if max(self._block_counts, default=0) < 2:
            return None
        return SegmentPlan(lengths=self._block_counts, device=self.device)

    def to_blocks(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """A float64 copy, cut into blocks: [T] to [M, 32], with `fill` behind the end of every segment."""
        if self._even_length is not None:
            rows = values.view(-1, self._even_length).to(torch.float64, copy=True)
            return torch.nn.functional.pad(rows, (0, -self._even_length % BLOCK), value=fill).view(-1, BLOCK)
        padding = values.new_full((BLOCK,), fill)
        ends = [padding[:size] for size in range(BLOCK)]
        segments = torch.split(values, list(self.lengths))
        pieces = [piece for segment in segments for piece in (segment, ends[-len(segment) % BLOCK])]
        return torch.cat(pieces).double().view(-1, BLOCK)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The values of `to_blocks`, without what was filled in: [M, 32] to [T]."""
        if self._even_length is not None:
            return blocks.view(len(self.lengths), -1)[:, : self._even_length].reshape(-1)
        sizes = [size for length in self.lengths for size in (length, -length % BLOCK)]
        return torch.cat(torch.split(blocks.view(-1), sizes)[::2])

    def next_heads(self, heads: Tensor, behind: float = 0.0) -> Tensor:
        """For every block the head of the block after it, or `behind` at the end of its segment: [M] to [M]."""
        return heads.roll(-1).index_fill_(0, self.last_blocks, behind)

    @cached_property
    def _block_counts(self) -> tuple[int, ...]:
        return tuple(-(-length // BLOCK) for length in self.lengths)

    @cached_property
    def _even_length(self) -> int | None:
        """The length of all segments where it is one and the same."""
        first = self.lengths[0]
        return first if first and self.lengths.count(first) == len(self.lengths) else None

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return copy_to(torch.tensor(numbers, dtype=torch.int64), self.device)


@lru_cache(maxsize=16)
def segment_plan(lengths: tuple[int, ...], device: torch.device) -> SegmentPlan:
    """Plan of segments of these lengths laid end to end; the last few are remembered."""
    return SegmentPlan(lengths=lengths, device=device)
