"""Where the tokens of one pack lie on each context-parallel rank.

A pack is several sequences laid end to end. Under context parallelism of size C every sequence is cut into chunks, and
every rank holds the same number of chunks of every sequence, some of which may be empty:

- `zigzag`: 2·C chunks, as even as the length allows; rank r holds chunk r and chunk 2·C−1−r, so that causal attention
  costs every rank the same. Attention and rotary embeddings need chunks of exactly equal length, for which sequences
  are padded to a multiple of 2·C; sums over tokens do not.
- `contiguous`: the pack is cut into C even pieces wherever the borders of sequences lie; chunk r of a sequence is what
  piece r holds of it.

A rank's local tensor is, sequence by sequence, its chunks in order of position. Everything here is a pure function of
(lengths, scheme, cp_rank, cp_size); nothing communicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

Scheme = Literal["zigzag", "contiguous"]


def sequence_multiple(cp_size: int) -> int:
    """Length multiple that every sequence is padded to: 2·C under context parallelism, else 1."""
    return 2 * cp_size if cp_size > 1 else 1


@dataclass(frozen=True)
class PackLayout:
    """Layout of one pack on one context-parallel rank: N sequences, T tokens, of which t lie here.

    Attributes:
        padded_lengths: Tokens of every sequence, including its padding where it has any.
        cp_size: Size C of the context-parallel group.
        cp_rank: This rank's place in the group.
        scheme: How sequences are cut; of no consequence where C is 1.

    Raises:
        ValueError: A length is negative, the rank lies outside the group, or the scheme is unknown.
    """

    padded_lengths: tuple[int, ...]
    cp_size: int = 1
    cp_rank: int = 0
    scheme: Scheme = "zigzag"

    def __post_init__(self) -> None:
        if not 0 <= self.cp_rank < self.cp_size:
            raise ValueError(f"cp_rank = {self.cp_rank}: must lie in [0, cp_size = {self.cp_size})")
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme = {self.scheme!r}: must be one of {', '.join(get_args(Scheme))}")
        for index, length in enumerate(self.padded_lengths):
            if length < 0:
                raise ValueError(f"padded_lengths[{index}] = {length}: must not be negative")

    def require_equal_chunks(self) -> None:
        """Refuse a layout that attention cannot work on.

        Raises:
            ValueError: The scheme is not zigzag, or a length is not a positive multiple of 2·C.
        """
        if self.scheme != "zigzag":
            raise ValueError(f"scheme = {self.scheme!r}: attention needs 'zigzag'")
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

    @cached_property
    def num_tokens(self) -> int:
        """Tokens T of the whole pack, all ranks together."""
        return sum(self.padded_lengths)

    @cached_property
    def num_local_tokens(self) -> int:
        """Tokens t that this rank holds."""
        return sum(self.local_chunk_lengths)

    @property
    def chunks_per_sequence(self) -> int:
        """Chunks that a sequence is cut into over the whole group; 1 without context parallelism."""
        return sequence_multiple(self.cp_size) if self.scheme == "zigzag" else self.cp_size

    @property
    def local_chunk_numbers(self) -> tuple[int, ...]:
        """Numbers, in order of position, of the chunks of every sequence that this rank holds."""
        return zigzag_chunk_numbers(self.cp_rank, self.cp_size) if self.scheme == "zigzag" else (self.cp_rank,)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Starts of the sequences in the whole pack, and its end: [N + 1] int32 on the CPU."""
        return _starts(self.padded_lengths)

    @cached_property
    def local_chunk_lengths(self) -> tuple[int, ...]:
        """Tokens of every chunk of the local tensor, in its order: N · len(local_chunk_numbers) numbers."""
        return tuple(end - start for start, end in self._local_chunks)

    @cached_property
    def local_cu_chunks(self) -> Tensor:
        """Starts of the chunks in the local tensor, and its end: [number of chunks + 1] int32 on the CPU."""
        return _starts(self.local_chunk_lengths)

    @cached_property
    def local_indices(self) -> Tensor:
        """For every local token its index in the whole pack: [t] int64 on the CPU."""
        pieces = [torch.arange(start, end) for start, end in self._local_chunks]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    @cached_property
    def local_sequence_ids(self) -> Tensor:
        """For every local token the number of its sequence in the pack: [t] int64 on the CPU."""
        lengths = torch.tensor(self.local_chunk_lengths, dtype=torch.int64)
        chunks = torch.arange(len(lengths)) // len(self.local_chunk_numbers)
        return torch.repeat_interleave(chunks, lengths)

    @cached_property
    def local_positions(self) -> Tensor:
        """For every local token its position in its own sequence: [t] int64 on the CPU."""
        return self.local_indices - self.cu_seqlens.long()[self.local_sequence_ids]

    @cached_property
    def joined_rows(self) -> Tensor:
        """For every token of the pack its row in the parts of ranks 0 … C−1 laid end to end: [T] int64 on the CPU."""
        rows = torch.empty(self.num_tokens, dtype=torch.int64)
        rows[torch.cat([self.on_rank(rank).local_indices for rank in range(self.cp_size)])] = torch.arange(len(rows))
        return rows

    def on_rank(self, cp_rank: int) -> "PackLayout":
        """The same pack as another rank of the group sees it."""
        return replace(self, cp_rank=cp_rank)

    def shard(self, values: Tensor) -> Tensor:
        """This rank's part of a pack: [T, ...] to [t, ...]."""
        if values.shape[0] != self.num_tokens:
            raise ValueError(f"values.shape[0] = {values.shape[0]}: the pack has {self.num_tokens} tokens")
        if self.cp_size == 1:
            return values
        return values.index_select(0, copy_to(self.local_indices, values.device))

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole pack from the parts of ranks 0 … C−1: C × [t, ...] to [T, ...]."""
        if len(shards) != self.cp_size:
            raise ValueError(f"len(shards) = {len(shards)}: the group has cp_size = {self.cp_size} ranks")
        if self.cp_size == 1:
            return shards[0]
        return torch.cat(list(shards)).index_select(0, copy_to(self.joined_rows, shards[0].device))

    @cached_property
    def _local_chunks(self) -> tuple[tuple[int, int], ...]:
        """Start and end in the pack of every local chunk, sequence by sequence."""
        chunks: list[tuple[int, int]] = []
        start = 0
        for length in self.padded_lengths:
            chunks.extend(self._chunk(start, length, number) for number in self.local_chunk_numbers)
            start += length
        return tuple(chunks)

    def _chunk(self, start: int, length: int, number: int) -> tuple[int, int]:
        """Start and end in the pack of one chunk of the sequence that begins at `start`."""
        count = self.chunks_per_sequence
        if self.scheme == "zigzag":
            return start + number * length // count, start + (number + 1) * length // count
        first, last = (each * self.num_tokens // count for each in (number, number + 1))
        return min(max(first, start), start + length), min(max(last, start), start + length)


def zigzag_chunk_numbers(cp_rank: int, cp_size: int) -> tuple[int, ...]:
    """Chunks of a sequence that a rank holds: (r, 2·C−1−r), or the only one without context parallelism."""
    return (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,)


def copy_to(values: Tensor, device: torch.device) -> Tensor:
    """Host values on a device, copied from pinned memory: from pageable memory the host would wait for the stream."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _starts(lengths: Sequence[int]) -> Tensor:
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    if lengths:
        starts[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return starts
