"""The actor's logits on a few sequences, for comparisons with other models, and where these sequences come from."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.micro_batch import RoutedExperts, build_micro_batch
from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.parallel.packing import plan_packs
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import TrainBatch

_RANDOM_LENGTHS = (33, 64, 17, 48)
_MAX_SEQUENCES = 4
_MAX_TOKENS = 64
_TAIL_BYTES = 2**22
_TEXTS = (
    "A farmer has 17 sheep and buys 8 more. How many sheep are there now? Let us add: 17 + 8 = 25, so there are 25.",
    "Solve for x: 3x - 7 = 11. Adding 7 to both sides gives 3x = 18, and dividing by 3 gives x = 6.",
    "def greatest_common_divisor(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n",
    "Question: Which number comes next in 1, 1, 2, 3, 5, 8? Answer: each is the sum of the two before, so 13.",
)


def probe_sequences(folder: Path, vocab_size: int, run: Path | None) -> tuple[list[list[int]], str]:
    """Token ids of a few sequences, and what they are.

    Args:
        folder: Where the tokenizer is. Without one that can be read, tokens are random.
        vocab_size: Tokens that the model has.
        run: A run directory, whose newest sampled prompts and responses are taken.
    """
    try:
        tokenizer = load_tokenizer(folder, vocab_size)
    except ConfigError:
        return random_sequences(vocab_size), "random tokens, for want of a tokenizer"
    texts = _sampled(run)
    kind = "the run's own prompts and responses" if texts else "built-in texts"
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts or _TEXTS]
    sequences = [ids[:_MAX_TOKENS] for ids in encoded if len(ids) > 1]
    if not sequences:
        return random_sequences(vocab_size), "random tokens, as the texts have none"
    return sequences, kind


def _sampled(run: Path | None) -> Sequence[str]:
    """Prompts with their responses, from the end of samples.jsonl, which may be long."""
    path = None if run is None else run / "samples.jsonl"
    if path is None or not path.is_file():
        return ()
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    texts: list[str] = []
    for line in reversed(lines):
        try:
            record = json.loads(line)
            texts.append(record["prompt"] + record["response"])
        except (ValueError, KeyError, TypeError):
            # The first line is cut off, and the last one may be.
            continue
        if len(texts) == _MAX_SEQUENCES:
            break
    return texts


def random_sequences(vocab_size: int) -> list[list[int]]:
    """A few sequences of random tokens, always the same ones."""
    draws = np.random.default_rng(0)
    return [draws.integers(0, vocab_size, length).tolist() for length in _RANDOM_LENGTHS]


class Probe:
    """Sequences laid out as the actor takes them.

    Args:
        sequences: Token ids.
        parallelism: The actor's process grid.
        context: This rank's place in it.
    """

    def __init__(
        self, sequences: Sequence[Sequence[int]], parallelism: ParallelismConfig, context: ParallelContext
    ) -> None:
        self.sequences, self._context = sequences, context
        batch = _batch(sequences)
        rules = packing_rules(parallelism)
        # The sequences' lengths are their own; the run's budget may be below them.
        room = 2 * len(batch.token_ids) + rules.pack_multiple
        rules = dataclasses.replace(rules, max_tokens=max(rules.max_tokens, room))
        plan = plan_packs(batch.sequence_lengths.tolist(), [0] * batch.num_sequences, 1, rules)
        self._packs = plan[0][0]
        self._micro_batches = [build_micro_batch(batch, pack, context, compute_device()) for pack in self._packs]

    def logits(self, forward: ActorForward) -> list[Tensor]:
        """Logits [L, V] float32 of every sequence, on the last pipeline stage; elsewhere nothing.

        Args:
            forward: The actor; every rank of its grid takes part, and every replica runs all sequences.
        """
        found: dict[int, Tensor] = {}
        for number, local in enumerate(forward.logits(self._micro_batches)):
            shards = [torch.empty_like(local) for _ in range(self._context.cp_size)]
            dist.all_gather(shards, local.contiguous(), group=self._context.cp_group)
            found |= self._by_sequence(number, self._micro_batches[number].layout.unshard(shards))
        return [found[index] for index in sorted(found)]

    def send_to(self, experts: Sequence[Tensor]) -> None:
        """Have the actor send tokens to these experts, where its forward pass replays routing and there is one pack.

        Args:
            experts: [ΣL, k] of every layer that has some; rows as those of `rows`.
        """
        (micro_batch,) = self._micro_batches
        (num_tokens,) = micro_batch.token_ids.shape[1:]
        numbers = self.rows(torch.arange(num_tokens, device=micro_batch.token_ids.device)).cpu()
        recorded = torch.zeros(num_tokens, dtype=torch.bool)
        recorded[numbers] = True
        chosen = torch.zeros(len(experts), num_tokens, experts[0].shape[1], dtype=torch.int16)
        for layer, rows in enumerate(experts):
            chosen[layer, numbers] = rows.to(torch.int16)
        micro_batch.routed_experts = RoutedExperts(chosen, recorded)

    def rows(self, packed: Tensor) -> Tensor:
        """Rows of the sequences, one after the other, of what an actor gives for all of them in one pack.

        Args:
            packed: [t, ...] of the pack.
        """
        parts = self._by_sequence(0, packed)
        return torch.cat([parts[index] for index in range(len(self.sequences))])

    def _by_sequence(self, number: int, packed: Tensor) -> dict[int, Tensor]:
        starts = self._micro_batches[number].layout.cu_seqlens.tolist()
        return {
            index: packed[starts[place] : starts[place] + len(self.sequences[index])]
            for place, index in enumerate(self._packs[number].sequences)
        }


def _batch(sequences: Sequence[Sequence[int]]) -> TrainBatch:
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    total, count = int(lengths.sum()), len(lengths)
    zeros = np.zeros(count, dtype=np.int32)
    return TrainBatch(
        token_ids=np.concatenate([np.asarray(sequence, dtype=np.int32) for sequence in sequences]),
        sequence_lengths=lengths,
        prompt_lengths=np.ones(count, dtype=np.int32),
        response_mask=np.zeros(total, dtype=bool),
        rollout_log_probs=np.zeros(total, dtype=np.float32),
        rewards=np.zeros(count, dtype=np.float32),
        advantages=np.zeros(count, dtype=np.float32),
        group_ids=zeros,
        mini_batch_ids=zeros,
        policy_versions=np.full(total, -1, dtype=np.int32),
        temperature=1.0,
    )
