"""A fixed response, and its log-probabilities under the actor."""

import copy
from collections.abc import Collection

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.micro_batch import build_micro_batch
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.parallel.packing import PackingRules, plan_packs
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import TrainBatch

_LENGTH = 64
_SHORTEST = 4


def canary_token_ids(vocab_size: int, special_token_ids: Collection[int], longest: int) -> list[int]:
    """Tokens of the canary, prompt and response together; always the same for the same model.

    Args:
        vocab_size: Tokens are below its last one, which SGLang takes for a placeholder where it scores a prompt.
        special_token_ids: Tokens to avoid, where the vocabulary has others.
        longest: Tokens that trainer and servers can take.
    """
    usable = range(vocab_size - 1)
    ordinary = sorted(set(usable) - set(special_token_ids)) or list(usable)
    draws = np.random.default_rng(0).integers(0, len(ordinary), max(min(_LENGTH, longest), _SHORTEST))
    return [ordinary[draw] for draw in draws]


class Canary:
    """The canary on the actor's side.

    Args:
        token_ids: From `canary_token_ids`; the first quarter is the prompt.
        forward: The actor's forward pass.
        rules: What a legal pack looks like.
        context: This rank's place.
    """

    def __init__(
        self, token_ids: list[int], forward: ActorForward, rules: PackingRules, context: ParallelContext
    ) -> None:
        length = len(token_ids) // 4
        self.prompt_token_ids, self.response_token_ids = token_ids[:length], token_ids[length:]
        self.context = context
        # Servers give log-probabilities of a given response at temperature 1, whatever the run samples at.
        self._forward = copy.copy(forward)
        self._forward.temperature = 1.0
        batch = _batch(token_ids, length)
        ((packs,),) = plan_packs([len(token_ids)], [0], 1, rules)
        self._micro_batches = [build_micro_batch(batch, pack, context, compute_device()) for pack in packs]
        is_source = context.is_pipeline_last_stage and context.tp_rank == 0 and context.dp_cp_group.rank() == 0
        self._source = gather_json(is_source).index(True)

    def log_probs(self) -> list[float]:
        """Log-probabilities of the response's tokens under the actor's weights, at temperature 1.

        Collective over all ranks, and on every rank the same; each replica computes them.
        """
        found = self._forward.log_probs(self._micro_batches, replay_routing=False)
        response: list[float] = []
        for micro_batch, local in zip(self._micro_batches, found, strict=False):
            shards = [torch.empty_like(local) for _ in range(self.context.cp_size)]
            dist.all_gather(shards, local.contiguous(), group=self.context.cp_group)
            if micro_batch.sequences:
                whole = micro_batch.layout.unshard(shards)
                first = len(self.prompt_token_ids) - 1
                response = whole[first : first + len(self.response_token_ids)].tolist()
        told: list[float] = broadcast_json(response, self._source)
        return told


def _batch(token_ids: list[int], prompt_length: int) -> TrainBatch:
    length = len(token_ids)
    mask = np.arange(length) >= prompt_length
    return TrainBatch(
        token_ids=np.array(token_ids, dtype=np.int32),
        sequence_lengths=np.array([length], dtype=np.int32),
        prompt_lengths=np.array([prompt_length], dtype=np.int32),
        response_mask=mask,
        rollout_log_probs=np.zeros(length, dtype=np.float32),
        rewards=np.zeros(1, dtype=np.float32),
        advantages=np.zeros(1, dtype=np.float32),
        group_ids=np.zeros(1, dtype=np.int32),
        mini_batch_ids=np.zeros(1, dtype=np.int32),
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        temperature=1.0,
    )
