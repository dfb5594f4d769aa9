"""One micro-batch as tensors on one rank.

Everything is indexed by the position that predicts: entry t of a sequence is about the token at t + 1, since the
model's output for it lives at t. Shifting before the sequence is cut into chunks leaves no border to look across.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.parallel.packing import Pack
from megatron_fipo.types import TrainBatch


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Where the tokens that a rank's routers see are sent: t / W of them under sequence parallelism of W ranks.

    Attributes:
        experts: [layers with experts on this rank, t / W, k] uint8 or int16; on the host until they are used.
        recorded: [t / W] bool, false where the router chooses for itself.
    """

    experts: Tensor
    recorded: Tensor

    def to(self, device: torch.device) -> "RoutedExperts":
        """The same on a device."""
        return RoutedExperts(self.experts.to(device), self.recorded.to(device))


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """A pack's local part: t = layout.num_local_tokens positions, N sequences, R positions that count.

    Attributes:
        layout: Where the pack's tokens lie on this rank.
        sequences: [N real sequences] their indices in the rollout batch; a filler sequence has none.
        token_ids: [1, t] int64 input tokens, 0 in padding.
        response_mask: [t] bool, true where the predicted token is a response token that counts.
        response_positions: [R] int64 local positions where the mask is true.
        response_targets: [R] int64 tokens predicted there.
        response_lengths: [N] int64 response tokens of every sequence over all ranks; 0 for a filler.
        sequence_numbers: [N] int64 `sequences` on the device, −1 for a filler.
        advantages: [t] float32.
        rollout_log_probs: [t] float32, the engine's.
        response_places: [t] int32, place of the predicted token in its response, from 0; 0 outside responses.
        policy_versions: [t] int32, version of the weights that gave the predicted token; −1 outside responses.
        old_log_probs: [t] float64, the actor's before the first update, whichever policy versions sampled the tokens;
            set by the old-log-probability pass.
        reference_log_probs: [t] float64, the reference policy's; set where the algorithm has a reference KL.
        routed_experts: Where the actor's routers are to send the tokens; None leaves it to them.
    """

    layout: PackLayout
    sequences: tuple[int, ...]
    token_ids: Tensor
    response_mask: Tensor
    response_positions: Tensor
    response_targets: Tensor
    response_lengths: Tensor
    sequence_numbers: Tensor
    advantages: Tensor
    rollout_log_probs: Tensor
    response_places: Tensor
    policy_versions: Tensor
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    routed_experts: RoutedExperts | None = None


def build_micro_batch(
    batch: TrainBatch,
    pack: Pack,
    context: ParallelContext,
    device: torch.device,
    numbers: Sequence[int] | None = None,
) -> MicroBatch:
    """Lay a pack's sequences out and keep this rank's part.

    Args:
        batch: Holds the pack's sequences.
        pack: Which sequences, and their padded lengths.
        context: This rank's place.
        device: Where the tensors go.
        numbers: The pack's sequences as the rollout batch numbers them, where `batch` is a part of it.
    """
    numbers = pack.sequences if numbers is None else numbers
    layout = pack.layout(context.cp_size, context.cp_rank)
    tokens = torch.zeros(layout.num_tokens, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    mask = torch.zeros(layout.num_tokens, dtype=torch.bool)
    advantages = torch.zeros(layout.num_tokens, dtype=torch.float32)
    rollout_log_probs = torch.zeros_like(advantages)
    places = torch.zeros(layout.num_tokens, dtype=torch.int32)
    versions = torch.full_like(places, -1)
    response_lengths = torch.zeros(layout.num_sequences, dtype=torch.int64)
    starts = batch.sequence_starts
    for place, index in enumerate(pack.sequences):
        source = slice(int(starts[index]), int(starts[index + 1]))
        first = int(layout.cu_seqlens[place])
        length = source.stop - source.start
        ids = torch.from_numpy(batch.token_ids[source]).long()
        counts = torch.from_numpy(batch.response_mask[source])
        tokens[first : first + length] = ids
        shifted = slice(first, first + length - 1)
        targets[shifted] = ids[1:]
        mask[shifted] = counts[1:]
        rollout_log_probs[shifted] = torch.from_numpy(batch.rollout_log_probs[source])[1:]
        places[shifted] = (torch.arange(1, length, dtype=torch.int32) - int(batch.prompt_lengths[index])).clamp(min=0)
        versions[shifted] = torch.from_numpy(batch.policy_versions[source])[1:]
        advantages[shifted] = float(batch.advantages[index])
        response_lengths[place] = counts[1:].sum()
    local_mask = layout.shard(mask)
    positions = local_mask.nonzero().squeeze(1)
    return MicroBatch(
        layout=layout,
        sequences=tuple(numbers),
        token_ids=layout.shard(tokens)[None].to(device),
        response_mask=local_mask.to(device),
        response_positions=positions.to(device),
        response_targets=layout.shard(targets)[positions].to(device),
        response_lengths=response_lengths.to(device),
        sequence_numbers=torch.tensor([*numbers, *[-1] * (layout.num_sequences - len(numbers))]).to(device),
        advantages=layout.shard(advantages).to(device),
        rollout_log_probs=layout.shard(rollout_log_probs).to(device),
        response_places=layout.shard(places).to(device),
        policy_versions=layout.shard(versions).to(device),
    )
