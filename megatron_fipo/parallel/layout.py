"""Where the tokens of one pack lie on each context-parallel rank.

A pack is several sequences laid end to end. Under context parallelism of size C every sequence is padded to a
multiple of 2·C and cut into 2·C chunks of equal length; rank r holds chunk r and chunk 2·C−1−r ("zigzag"), so that
causal attention costs every rank the same. A rank's local tensor is, sequence by sequence, its first chunk and then
its second. Everything here is a pure function of (padded lengths, cp_rank, cp_size); nothing communicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def sequence_multiple(cp_size: int) -> int:
    """Length multiple that every sequence is padded to: 2·C under context parallelism, else 1."""
    return 2 * cp_size if cp_size > 1 else 1


@dataclass(frozen=True)
class PackLayout:
    """Layout of one pack on one context-parallel rank.

    Attributes:
        padded_lengths: Tokens of every sequence including its padding, each a multiple of `sequence_multiple(cp_size)`.
        cp_size: Size C of the context-parallel group.
        cp_rank: This rank's place in the group.

    Raises:
        ValueError: A length is not positive or not a multiple of 2·C, or the rank lies outside the group.
    """

    padded_lengths: tuple[int, ...]
    cp_size: int = 1
    cp_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.cp_rank < self.cp_size:
            raise ValueError(f"cp_rank = {self.cp_rank}: must lie in [0, cp_size = {self.cp_size})")
        multiple = sequence_multiple(self.cp_size)
        for index, length in enumerate(self.padded_lengths):
            if length <= 0 or length % multiple:
                raise ValueError(
                    f"padded_lengths[{index}] = {length}: must be a positive multiple of {multiple} "
                    f"(2 · cp_size for cp_size = {self.cp_size}); pad the sequence"
                )

    @property
    def num_sequences(self) -> int:
        """Number N of sequences in the pack."""
        return len(self.padded_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole pack, all ranks together."""
        return sum(self.padded_lengths)

    @property
    def num_local_tokens(self) -> int:
        """Tokens that each rank holds."""
        return self.num_tokens // self.cp_size

    @property
    def chunks_per_sequence(self) -> int:
        """Chunks that a sequence is cut into over the whole group: 2·C, or 1 without context parallelism."""
        return sequence_multiple(self.cp_size)

    @property
    def local_chunk_numbers(self) -> tuple[int, ...]:
        """Numbers, in order of position, of the chunks of every sequence that this rank holds."""
        return zigzag_chunk_numbers(self.cp_rank, self.cp_size)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Starts of the sequences in the whole pack, and its end: [N + 1] int32 on the CPU."""
        return _starts(self.padded_lengths)

    @cached_property
    def local_chunk_lengths(self) -> tuple[int, ...]:
        """Tokens of every chunk of the local tensor, in its order: N · (2 or 1) numbers."""
        return tuple(
            length // self.chunks_per_sequence for length in self.padded_lengths for _ in self.local_chunk_numbers
        )

    @cached_property
    def local_cu_chunks(self) -> Tensor:
        """Starts of the chunks in the local tensor, and its end: [N · (2 or 1) + 1] int32 on the CPU."""
        return _starts(self.local_chunk_lengths)

    @cached_property
    def local_indices(self) -> Tensor:
        """For every local token its index in the whole pack: [T / C] int64 on the CPU."""
        pieces = []
        start = 0
        for length in self.padded_lengths:
            chunk = length // self.chunks_per_sequence
            for number in self.local_chunk_numbers:
                first = start + number * chunk
                pieces.append(torch.arange(first, first + chunk))
            start += length
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    @cached_property
    def local_sequence_ids(self) -> Tensor:
        """For every local token the number of its sequence in the pack: [T / C] int64 on the CPU."""
        lengths = torch.tensor([length // self.cp_size for length in self.padded_lengths], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(self.num_sequences), lengths)

    @cached_property
    def local_positions(self) -> Tensor:
        """For every local token its position in its own sequence: [T / C] int64 on the CPU."""
        return self.local_indices - self.cu_seqlens.long()[self.local_sequence_ids]

    def on_rank(self, cp_rank: int) -> "PackLayout":
        """The same pack as another rank of the group sees it."""
        return PackLayout(self.padded_lengths, self.cp_size, cp_rank)

    def shard(self, values: Tensor) -> Tensor:
        """This rank's part of a pack: [T, ...] to [T / C, ...]."""
        if values.shape[0] != self.num_tokens:
            raise ValueError(f"values.shape[0] = {values.shape[0]}: the pack has {self.num_tokens} tokens")
        if self.cp_size == 1:
            return values
        return values.index_select(0, self.local_indices.to(values.device))

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole pack from the parts of ranks 0 … C−1: C × [T / C, ...] to [T, ...]."""
        if len(shards) != self.cp_size:
            raise ValueError(f"len(shards) = {len(shards)}: the group has cp_size = {self.cp_size} ranks")
        if self.cp_size == 1:
            return shards[0]
        whole = shards[0].new_empty(self.num_tokens, *shards[0].shape[1:])
        for rank, shard in enumerate(shards):
            whole[self.on_rank(rank).local_indices.to(shard.device)] = shard
        return whole


def zigzag_chunk_numbers(cp_rank: int, cp_size: int) -> tuple[int, ...]:
    """Chunks of a sequence that a rank holds: (r, 2·C−1−r), or the only one without context parallelism."""
    return (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,)


def _starts(lengths: Sequence[int]) -> Tensor:
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    if lengths:
        starts[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return starts
