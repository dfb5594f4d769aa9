"""The actor's forward pass: micro-batch in, log-probabilities and entropy out, on every schedule of megatron-core."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_fipo.actor.local_layers import LocalPackedSeqParams, attention_plan
from megatron_fipo.actor.log_probs import VocabularyShard, linear_log_probs
from megatron_fipo.actor.micro_batch import MicroBatch, RoutedExperts
from megatron_fipo.actor.routing import RoutingReplay
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.device import uses_transformer_engine
from megatron_fipo.platform.host_memory import require_resident
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress

# "log_probs" [t] float64 with gradient and "entropy" [t] float64; zero where no response token is predicted.
# A dictionary, because megatron-core asks a model's output for its device and knows tensors and dictionaries alone.
Scores = dict[str, Tensor]
LossFunction = Callable[..., Any]


class ActorForward:
    """Runs micro-batches through this rank's model chunks.

    Args:
        chunks: Model chunks wrapped for data parallelism.
        provider: The model's transformer configuration.
        model: Chunking of the log-probabilities.
        context: This rank's place.
        vocab_size: Vocabulary without padding rows.
        temperature: Sampling temperature, at which log-probabilities are taken.
        routing: Replays the experts that the rollout engine chose; None lets the routers choose.

    Attributes:
        progress: Told of every micro-batch.
    """

    progress: Progress = NO_PROGRESS

    def __init__(
        self,
        chunks: list[Any],
        provider: Any,
        model: ModelConfig,
        context: ParallelContext,
        vocab_size: int,
        temperature: float,
        routing: RoutingReplay | None = None,
    ) -> None:
        self.chunks, self.provider, self.model, self.context = chunks, provider, model, context
        self.vocab_size, self.temperature, self.routing = vocab_size, temperature, routing
        self._schedule = get_forward_backward_func()

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_function: Callable[[MicroBatch], LossFunction],
        *,
        forward_only: bool,
        collect: bool = False,
        processor: Callable[..., Any] | None = None,
        replay_routing: bool = True,
    ) -> list[Any]:
        """Run every micro-batch through the pipeline.

        Args:
            micro_batches: This rank's micro-batches, as many as on every other rank.
            loss_function: Gives for a micro-batch the function that turns its scores into megatron-core's loss tuple,
                or with `collect` into anything.
            forward_only: Leave the backward pass out.
            collect: Gather what the loss function returns instead of treating it as a loss.
            processor: Turns the last hidden states into what the loss function gets; by default scores.
            replay_routing: Send tokens to the micro-batches' `routed_experts`, where this forward pass has a replay.

        Returns:
            On the last pipeline stage one entry per micro-batch; elsewhere nothing.

        Raises:
            RunError: The weights are off the device.
        """
        require_resident((each for chunk in self.chunks for each in chunk.parameters()), "the actor's weights")
        iterators = [iter(micro_batches) for _ in self.chunks]

        numbers = itertools.count(1)

        def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Any, LossFunction]:
            micro_batch = next(iterator)
            self.progress.begin_micro_batch(next(numbers), len(micro_batches) * len(self.chunks))
            routed = micro_batch.routed_experts if replay_routing else None
            return self._forward(micro_batch, chunk, processor or self._scores, routed), loss_function(micro_batch)

        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=max(micro_batch.layout.num_tokens for micro_batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )

    @torch.no_grad()
    def log_probs(self, micro_batches: Sequence[MicroBatch], *, replay_routing: bool = True) -> list[Tensor]:
        """Log-probabilities [t] float64 of every micro-batch, on the last pipeline stage; elsewhere nothing.

        Args:
            micro_batches: As in `run`.
            replay_routing: As in `run`; false for another model than the one whose routing was recorded.
        """

        def keep_log_probs(scores: Scores, non_loss_data: bool = True) -> Tensor:
            return scores["log_probs"]

        return self.run(
            micro_batches,
            lambda _: keep_log_probs,
            forward_only=True,
            collect=True,
            replay_routing=replay_routing,
        )

    @torch.no_grad()
    def logits(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Logits [t, V] float32 at every local position of every micro-batch, on the last pipeline stage."""

        def keep(logits: Tensor, non_loss_data: bool = True) -> Tensor:
            return logits

        return self.run(micro_batches, lambda _: keep, forward_only=True, collect=True, processor=self._full_logits)

    def _forward(
        self, micro_batch: MicroBatch, chunk: Any, processor: Callable[..., Any], routed: RoutedExperts | None
    ) -> Any:
        forward = partial(
            chunk,
            input_ids=micro_batch.token_ids,
            position_ids=None,
            attention_mask=None,
            packed_seq_params=_packed_seq_params(micro_batch),
            output_processor=processor,
            output_processor_context=micro_batch,
        )
        return forward() if self.routing is None else self.routing.run(chunk, routed, forward)

    def _scores(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        **_: Any,
    ) -> Scores:
        """Scores from the last hidden states."""
        parallel = self.context
        hidden, weight = self._gather_hidden(hidden_states), _output_weight(output_layer, output_weight)
        shard = VocabularyShard(
            start=parallel.tp_rank * weight.shape[0], vocab_size=self.vocab_size, group=parallel.tp_group
        )
        positions = context.response_positions
        log_probs, entropy = linear_log_probs(
            hidden.index_select(0, positions),
            weight,
            context.response_targets,
            shard,
            temperature=self.temperature,
            chunk_tokens=self.model.log_prob_chunk_tokens,
            recompute_logits=self.model.recompute_logits,
        )
        everywhere = torch.zeros(context.layout.num_local_tokens, dtype=torch.float64, device=log_probs.device)
        return {
            "log_probs": everywhere.index_copy(0, positions, log_probs),
            "entropy": everywhere.index_copy(0, positions, entropy),
        }

    def _full_logits(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any
    ) -> Tensor:
        """Logits of the whole vocabulary; for checks, not for training."""
        part = self._gather_hidden(hidden_states) @ _output_weight(output_layer, output_weight).t()
        parts = [torch.empty_like(part) for _ in range(self.context.tp_size)]
        dist.all_gather(parts, part.contiguous(), group=self.context.tp_group)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size].float()

    def _gather_hidden(self, hidden_states: Tensor) -> Tensor:
        """[t, 1, h], or [t / W, 1, h] under sequence parallelism, to [t, h] on every tensor-parallel rank."""
        group = self.context.tp_group
        if self.provider.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=group
            )
        elif self.context.tp_size > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        return hidden_states.squeeze(1)


def _output_weight(output_layer: Any, shared: Tensor | None) -> Tensor:
    """The output matrix: the embedding's where they are tied."""
    return output_layer.weight if shared is None else shared


def _packed_seq_params(micro_batch: MicroBatch) -> PackedSeqParams:
    layout = micro_batch.layout
    cu_seqlens = layout.cu_seqlens.to(micro_batch.token_ids.device)
    longest = max(layout.padded_lengths)
    fields: dict[str, Any] = {
        "qkv_format": "thd",
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "cu_seqlens_q_padded": cu_seqlens,
        "cu_seqlens_kv_padded": cu_seqlens,
        # The true longest sequence: megatron-core reads a length equal to the pack's as "positions run on".
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }
    if uses_transformer_engine():
        return PackedSeqParams(**fields)
    return LocalPackedSeqParams(**fields, plan=attention_plan(layout))
