"""An actor on one rank that reads its weights from a checkpoint as its forward pass needs them.

A model is then run in the memory of its largest layer. It is megatron-core's own model with its own names of tensors;
nothing here knows how these are called elsewhere. Of a mixture of experts, tokens go where their micro-batch says.
"""

from collections import defaultdict
from collections.abc import Callable

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megatron_fipo.actor.checkpoint_shards import shards_to_read
from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.model import build_provider
from megatron_fipo.actor.routing import RoutingReplay
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.conversion.transformers_run import first_of
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.device import DTYPES, compute_device

Observer = Callable[[str, Tensor], None]


class LayerwiseActor:
    """A model without weights, which each part of it reads when it is entered.

    Args:
        bridge: Describes the model.
        model: Precision to compute in, and overrides.
        context: This rank's place, where nothing but data is parallel.
        read: Gives a whole tensor of the checkpoint by its name.
        keeps_weights: Whether a part keeps what it has read; else it lets go of it when it is left.
    """

    def __init__(
        self,
        bridge: HfBridge,
        model: ModelConfig,
        context: ParallelContext,
        read: Callable[[str], Tensor],
        keeps_weights: bool,
    ) -> None:
        provider = build_provider(bridge, model, ParallelismConfig(), context)
        provider.perform_initialization = False
        with torch.device("meta"):
            chunk = provider.provide(pre_process=True, post_process=True, vp_stage=None)
        self.chunk = chunk.eval().requires_grad_(False)
        self._read, self._keeps, self._dtype = read, keeps_weights, DTYPES[model.dtype]
        self._shards: dict[int, list[ShardedTensor]] = defaultdict(list)
        for shard in shards_to_read([self.chunk], None, context):
            self._shards[shard.data.untyped_storage()._cdata].append(shard)
        # The parameters that are to be read, by the module that has them; kept, as their storages are known by them.
        self._absent = {
            (owner, name): parameter
            for owner in self.chunk.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        }
        self._add_hooks()
        routing = RoutingReplay([self.chunk], provider, context) if provider.num_moe_experts else None
        self.forward = ActorForward(
            [self.chunk], provider, model, context, bridge.vocab_size, temperature=1.0, routing=routing
        )

    def observe(self, observer: Observer) -> None:
        """Have the outputs of every part told, under transformers' names of the parts.

        Args:
            observer: Gets a name and the output, [tokens, 1, hidden].
        """
        decoder = self.chunk.decoder
        parts = {"model.embed_tokens": self.chunk.embedding, "model.norm": decoder.final_layernorm}
        for number, layer in enumerate(decoder.layers):
            parts[f"model.layers.{number}.self_attn"] = layer.self_attention
            parts[f"model.layers.{number}"] = layer
        for name, part in parts.items():
            part.register_forward_hook(lambda _, __, output, name=name: observer(name, first_of(output)))

    def close(self) -> None:
        """Let go of all weights; they are read again where they are needed."""
        for (owner, name), absent in self._absent.items():
            setattr(owner, name, absent)

    def _add_hooks(self) -> None:
        decoder = self.chunk.decoder
        for part in (self.chunk.embedding, *decoder.layers):
            part.register_forward_pre_hook(lambda part, _: self._fill(part))
            part.register_forward_hook(lambda part, *_: self._let_go(part))
        # The output matrix is read as a tensor, by no module's forward pass; where it is tied, it is the embedding's.
        tied = self.chunk.share_embeddings_and_output_weights
        output = self.chunk.embedding if tied else self.chunk.output_layer
        decoder.final_layernorm.register_forward_pre_hook(lambda part, _: self._fill(part, output))

    def _fill(self, *parts: nn.Module) -> None:
        for owner, name, absent in (each for part in parts for each in self._parameters_of(part)):
            if owner._parameters[name] is absent:
                setattr(owner, name, nn.Parameter(self._filled(absent), requires_grad=False))

    def _let_go(self, part: nn.Module) -> None:
        for owner, name, absent in [] if self._keeps else self._parameters_of(part):
            setattr(owner, name, absent)

    def _parameters_of(self, part: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
        return [
            (owner, name, self._absent[owner, name])
            for owner in part.modules()
            for name in owner._parameters
            if (owner, name) in self._absent
        ]

    def _filled(self, absent: Tensor) -> Tensor:
        filled = torch.empty(absent.shape, dtype=self._dtype, device=compute_device())
        shards = self._shards[absent.untyped_storage()._cdata]
        assert shards, "a parameter is in no checkpoint"
        for shard in shards:
            place = filled.as_strided(shard.data.shape, shard.data.stride(), shard.data.storage_offset())
            # The vocabulary is padded for the tensor-parallel size that wrote it.
            place.copy_(self._read(shard.key)[: place.shape[0]])
        return filled
