"""Rollout routing replay (R3): the actor's tokens go to the experts that the rollout engine chose for them.

Engine and trainer compute a router's logits with different kernels, so that near a tie they choose different experts,
and one other expert moves a log-probability more than all rounding together. With replay the trainer takes over the
engine's choice, in the old-log-probability pass and in the updates (arXiv:2510.11370). The weights of the chosen
experts come from the trainer's own logits, with gradient, so the router learns on. The reference policy is another
model and routes for itself.

megatron-core's `RouterReplay` has the same aim, and its routers ask it for their choice; only that call is used here.
Its own replay wants experts for every token, padding too, finds what to recompute with in one first-in, first-out list
that grows where nothing is recomputed, and is switched between forward and backward pass by hand for all layers at
once, which no pipeline schedule does. Here the micro-batch that a model chunk works on says where its tokens go; its
backward pass, in which activations may be recomputed, begins by saying so again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor.micro_batch import RoutedExperts
from megatron_fipo.actor.model import unwrap
from megatron_fipo.config.base import require
from megatron_fipo.data.routing_file import RoutingFile, RoutingFileError
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import LongArray


def require_replayable(provider: Any) -> None:
    """Refuse a model whose routing cannot be replayed.

    Args:
        provider: The model's transformer configuration.

    Raises:
        ConfigError: The model has no experts, or its configuration routes in a way that knows no chosen experts.
    """
    require(
        bool(provider.num_moe_experts),
        field="rollout.replay_routing",
        value=True,
        rule="must be false for a dense model, which routes nothing",
        way_out="set it to false",
    )
    balancing = provider.moe_router_load_balancing_type
    kinds = {balancing} if isinstance(balancing, str) else set(balancing)
    unfit = {
        "moe_router_load_balancing_type": bool(kinds & {"sinkhorn", "quantile_balancing"}),
        "overlap_moe_expert_parallel_comm": bool(provider.overlap_moe_expert_parallel_comm),
        "cuda_graph_impl": provider.cuda_graph_impl != "none",
    }
    for name, is_unfit in unfit.items():
        require(
            not is_unfit,
            field=f"model.transformer_config_overrides.{name}",
            value=getattr(provider, name),
            rule="cannot be used with rollout.replay_routing, which chooses the experts of one micro-batch at a time",
            way_out="leave it out, or set rollout.replay_routing to false",
        )


class _ReplayingRouter:
    """Stands where a router of megatron-core looks for its `RouterReplay`.

    Attributes:
        experts: [t, k] of the tokens that the router sees; None where it chooses for itself.
        recorded: [t] bool, false where it chooses for itself.
        counts: [2] int64: replayed choices, and those of them that are not the router's own.
    """

    def __init__(self) -> None:
        self.experts: Tensor | None = None
        self.recorded: Tensor | None = None
        self.counts = torch.zeros(2, dtype=torch.int64, device=compute_device())

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts that each token goes to: [t, k] with gradient, [t, k]."""
        assert default_compute_topk is not None, "megatron-core's routers pass it"
        own_scores, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.experts is None or self.recorded is None:
            return own_scores, own
        chosen = torch.where(self.recorded[:, None], self.experts.long(), own)
        # With gradient a token passes once, be it while activations are recomputed.
        if torch.is_grad_enabled():
            differs = (chosen.sort(dim=1).values != own.sort(dim=1).values).any(dim=1)
            self.counts += torch.stack([self.recorded.sum(), differs.sum()])
        return scores.gather(1, chosen), chosen


@dataclass(frozen=True, slots=True)
class _Place:
    """A router: its number on this rank, and that of its layer among the model's layers with experts, both from 0."""

    router: _ReplayingRouter
    number: int
    moe_layer: int


class RoutingReplay:
    """Sends the tokens of micro-batches to the experts of `MicroBatch.routed_experts`, in this rank's layers.

    Args:
        chunks: The model chunks of this rank.
        provider: The model's transformer configuration, which `require_replayable` has let through.
        context: This rank's place.
    """

    def __init__(self, chunks: Sequence[Any], provider: Any, context: ParallelContext) -> None:
        self._num_experts, self._top_k = provider.num_moe_experts, provider.moe_router_topk
        self._moe_layers = moe_layers(provider)
        self._parts = context.tp_size if provider.sequence_parallel else 1
        self._part = context.tp_rank if provider.sequence_parallel else 0
        self._places: list[_Place] = []
        self._of_chunk = {
            id(chunk): self._install(bare) for chunk, bare in zip(chunks, unwrap(list(chunks)), strict=True)
        }

    def _install(self, chunk: Any) -> list[_Place]:
        """Put a replay into every router of a chunk's decoder."""
        first = len(self._places)
        for layer in chunk.decoder.layers:
            router = getattr(layer.mlp, "router", None)
            if router is None:
                continue
            # Transformer Engine's fused router asks nobody for the choice.
            router.config.moe_router_fusion = False
            router.router_replay = _ReplayingRouter()
            moe_layer = self._moe_layers.index(layer.layer_number - 1)
            place = _Place(router.router_replay, len(self._places), moe_layer)
            self._places.append(place)
        return self._places[first:]

    def run(self, chunk: Any, routed: RoutedExperts | None, forward: Callable[[], Any]) -> Any:
        """Run a micro-batch through a chunk, its tokens sent where `routed` says, and in the backward pass again.

        Args:
            chunk: One of this rank's chunks.
            routed: Where the tokens go; None lets the routers choose.
            forward: Runs the chunk.

        Returns:
            What `forward` returns.
        """
        places = self._of_chunk[id(chunk)]
        on_device = None if routed is None else routed.to(compute_device())

        def choose(_: Any = None) -> None:
            for place in places:
                place.router.experts = None if on_device is None else on_device.experts[place.number]
                place.router.recorded = None if on_device is None else on_device.recorded

        choose()
        output = forward()
        for tensor in output.values() if isinstance(output, Mapping) else (output,):
            if tensor.requires_grad:
                tensor.register_hook(choose)
        return output

    @property
    def layers(self) -> list[int]:
        """This rank's layers with experts, in the order of `RoutedExperts.experts`, counted among all of the model."""
        return [place.moe_layer for place in self._places]

    def part(self, values: LongArray) -> LongArray:
        """Of a value for each of the rank's tokens ([t]), those of the tokens that its routers see."""
        part: LongArray = torch.from_numpy(values).chunk(self._parts)[self._part].numpy()
        return part

    def read(self, file: RoutingFile, starts: LongArray, sequences: Sequence[int], layout: PackLayout) -> RoutedExperts:
        """The experts of the tokens of one micro-batch that this rank's routers see.

        Args:
            file: Experts of the rollout batch.
            starts: [N + 1] where its sequences start in it.
            sequences: Those of the pack, as the batch numbers them.
            layout: Where the pack's tokens lie.

        Raises:
            RoutingFileError: The file is of another model, or holds experts that are none.
        """
        if (file.num_layers, file.top_k) != (len(self._moe_layers), self._top_k):
            raise RoutingFileError(
                f"{file.path} holds {file.top_k} experts a token in {file.num_layers} layers, the actor has "
                f"{self._top_k} in {len(self._moe_layers)}: they are different models"
            )
        tokens = torch.full((layout.num_tokens,), -1, dtype=torch.int64)
        for place, index in enumerate(sequences):
            first = int(layout.cu_seqlens[place])
            tokens[first : first + int(starts[index + 1] - starts[index])] = torch.arange(
                int(starts[index]), int(starts[index + 1])
            )
        mine = self.part(layout.shard(tokens).numpy())
        experts, recorded = file.read(self.layers, mine)
        self._check(experts[:, recorded], file)
        return RoutedExperts(torch.from_numpy(experts), torch.from_numpy(recorded))

    def _check(self, experts: Any, file: RoutingFile) -> None:
        """Refuse what the exchange of tokens could not survive: each token needs k different experts of the model."""
        if not experts.size:
            return
        ordered = np.sort(experts, axis=-1)
        if int(ordered[..., -1].max()) >= self._num_experts or (ordered[..., 1:] == ordered[..., :-1]).any():
            raise RoutingFileError(
                f"{file.path} names an expert twice for one token, or one that the model's {self._num_experts} are "
                "not: the engine did not record them"
            )

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the passes with gradient since the last call; collective over all ranks."""
        counts = torch.zeros(2, dtype=torch.int64, device=compute_device())
        for place in self._places:
            counts += place.router.counts
            place.router.counts.zero_()
        dist.all_reduce(counts)
        replayed, differing = counts.tolist()
        return {"train/routing_mismatch_fraction": differing / replayed} if replayed else {}


def moe_layers(provider: Any) -> list[int]:
    """Layers with experts, from 0, as megatron-core reads `moe_layer_freq`."""
    pattern = provider.moe_layer_freq
    if isinstance(pattern, int):
        return list(range(0, provider.num_layers, pattern))
    return [number for number, has_experts in enumerate(pattern) if has_experts]
