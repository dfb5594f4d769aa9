"""What the loss says of a few sequences, token by token, from the ranks that hold them to rank 0."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.actor.forward import Scores
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.algorithms.policy_loss import LossOutput
from megatron_fipo.parallel.collectives import Arrays, gather_json, receive_arrays, send_arrays
from megatron_fipo.parallel.context import ParallelContext

# Columns of a token's values; log_ratio is not clamped, kept is 0 where its sequence was dropped.
COLUMNS = ("old_log_probs", "log_ratio", "future_kl", "influence_weights", "entropy", "kept")


class TokenRecorder:
    """Keeps the tokens of chosen sequences as their update sees them; costs nothing while none is chosen.

    Args:
        context: This rank's place.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._chosen: frozenset[int] = frozenset()
        self._kept: list[tuple[Tensor, Tensor]] = []

    def begin(self, sequences: Collection[int]) -> None:
        """Forget everything and choose sequences of the next rollout batch by index; the same on every rank."""
        self._chosen, self._kept = frozenset(sequences), []

    def keep(self, micro_batch: MicroBatch, scores: Scores, output: LossOutput) -> None:
        """Keep this rank's chosen tokens of a micro-batch; nothing waits for the device."""
        places = [place for place, index in enumerate(micro_batch.sequences) if index in self._chosen]
        # Tensor-parallel ranks have the same values.
        if not places or self._context.tp_rank:
            return
        layout = micro_batch.layout
        here = torch.isin(layout.local_sequence_ids, torch.tensor(places)).nonzero().squeeze(1)
        sequences = torch.tensor(micro_batch.sequences)[layout.local_sequence_ids[here]]
        assert micro_batch.old_log_probs is not None, "the loss has them"
        log_probs = scores["log_probs"].detach()
        columns = (
            micro_batch.old_log_probs,
            log_probs - micro_batch.old_log_probs,
            output.future_kl,
            output.influence_weights,
            scores["entropy"].detach(),
            output.kept_mask,
            micro_batch.response_mask,
        )
        index = here.to(log_probs.device)
        values = torch.stack([column.index_select(0, index).double() for column in columns], dim=1)
        self._kept.append((torch.stack([sequences, layout.local_positions[here]], dim=1), values))

    def collect(self) -> Arrays | None:
        """Bring all tokens to rank 0 and forget them; collective over all ranks.

        Returns:
            On rank 0: "sequences" [n] int64, indices in the rollout batch; "positions" [n] int64, where in its sequence
            the model predicts the token, which is the one after; "values" [n, len(COLUMNS)] float64. Sorted by sequence
            and position; response tokens that count alone. None on the other ranks.
        """
        mine = self._arrays()
        counts = gather_json(len(mine["sequences"]))
        if self._context.rank:
            if len(mine["sequences"]):
                send_arrays(mine, 0)
            return None
        parts = [mine] + [receive_arrays(rank) for rank, count in enumerate(counts) if rank and count]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in mine}
        order = np.lexsort((joined["positions"], joined["sequences"]))
        return {name: values[order] for name, values in joined.items()}

    def _arrays(self) -> Arrays:
        kept, self._kept = self._kept, []
        places = torch.cat([torch.empty(0, 2, dtype=torch.int64), *(place for place, _ in kept)])
        empty = torch.empty(0, len(COLUMNS) + 1, dtype=torch.float64)
        values = torch.cat([empty, *(value.cpu() for _, value in kept)])
        counts = values[:, -1] > 0
        places, values = places[counts], values[counts, :-1]
        return {
            "sequences": places[:, 0].numpy().copy(),
            "positions": places[:, 1].numpy().copy(),
            "values": values.numpy().copy(),
        }
