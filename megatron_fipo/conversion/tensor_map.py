"""Which tensor of a checkpoint becomes which tensors of a Hugging Face folder, by name, shape and order of rows.

Whole tensors of layers and experts, as `actor/checkpoint.py` names them. Three things differ beside names: queries,
keys and values lie in one matrix, key-value group by key-value group; the vocabulary may have padding rows; and a tied
output matrix is in a Hugging Face folder only as the embedding. Gate and up, and every expert, are tensors of their own
in both.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.hf_folder import EMBEDDING_NAME, OUTPUT_NAME

# What a layer is made of, by model_type: whether queries, keys and values have a bias, whether queries and keys are
# normed, and whether it is a mixture of experts.
_FAMILIES = {
    "qwen2": (True, False, False),
    "qwen3": (False, True, False),
    "qwen3_moe": (False, True, True),
    "llama": (False, False, False),
}
_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM")
# Settings that add tensors which are not translated, with the value that they must have.
_WITHOUT: dict[str, Any] = {"mlp_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 1}


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor of a Hugging Face folder.

    Attributes:
        name: Its name.
        shape: Its shape.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Link:
    """A tensor of a checkpoint and what it becomes.

    Attributes:
        names: Its name in the checkpoint: the one that this platform writes, and others that it may have.
        shape: Its shape, without padding rows.
        hf: The tensors that it becomes.
        group_rows: Rows that each of them has in a key-value group; empty where there is one, unchanged.
        may_be_padded: Whether the checkpoint's has rows after those of `shape`.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    hf: tuple[HfTensor, ...]
    group_rows: tuple[int, ...] = ()
    may_be_padded: bool = False

    @property
    def name(self) -> str:
        """The name that this platform writes."""
        return self.names[0]

    def split(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the Hugging Face tensors, of which those of unchanged rows are views.

        Args:
            tensor: The checkpoint's, padding included.
        """
        if not self.group_rows:
            yield tensor[: self.shape[0]]
            return
        groups = tensor.view(-1, sum(self.group_rows), *self.shape[1:])
        for part in groups.split(self.group_rows, dim=1):
            yield part.flatten(0, 1)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The checkpoint's tensor, without padding.

        Args:
            tensors: Those of `hf`.
        """
        if not self.group_rows:
            return tensors[0]
        parts = [tensor.view(-1, rows, *self.shape[1:]) for tensor, rows in zip(tensors, self.group_rows, strict=True)]
        return torch.cat(parts, dim=1).flatten(0, 1)


def tensor_map(config: PretrainedConfig, prefers_own_norm: bool = False) -> list[Link]:
    """Links of all tensors of a model, in the order of its forward pass.

    Args:
        config: The model's, as transformers reads it.
        prefers_own_norm: Whether the norm before a mixture of experts is written under a name of its own, as
            Transformer Engine's layers do; either name is read.

    Raises:
        ConfigError: The architecture is not translated.
    """
    _check(config)
    vocabulary = (int(config.vocab_size), int(config.hidden_size))
    links = [_plain("embedding.word_embeddings.weight", EMBEDDING_NAME, vocabulary, may_be_padded=True)]
    for layer in range(config.num_hidden_layers):
        links += _layer(config, layer, prefers_own_norm)
    links.append(_plain("decoder.final_layernorm.weight", "model.norm.weight", (config.hidden_size,)))
    if not config.tie_word_embeddings:
        links.append(_plain("output_layer.weight", OUTPUT_NAME, vocabulary, may_be_padded=True))
    return links


def _plain(megatron: str, hf: str, shape: tuple[int, ...], may_be_padded: bool = False) -> Link:
    return Link((megatron,), shape, (HfTensor(hf, shape),), may_be_padded=may_be_padded)


def _layer(config: PretrainedConfig, layer: int, prefers_own_norm: bool) -> Iterator[Link]:
    has_bias, has_norms, has_experts = _FAMILIES[config.model_type]
    here, there, hidden = f"decoder.layers.{layer}.", f"model.layers.{layer}.", config.hidden_size
    attention, theirs = f"{here}self_attention.", f"{there}self_attn."
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    yield _plain(f"{attention}linear_qkv.layer_norm_weight", f"{there}input_layernorm.weight", (hidden,))
    yield _qkv(config, attention, theirs, "weight", head_dim, (hidden,))
    if has_bias:
        yield _qkv(config, attention, theirs, "bias", head_dim, ())
    if has_norms:
        yield _plain(f"{attention}q_layernorm.weight", f"{theirs}q_norm.weight", (head_dim,))
        yield _plain(f"{attention}k_layernorm.weight", f"{theirs}k_norm.weight", (head_dim,))
    output_shape = (hidden, config.num_attention_heads * head_dim)
    yield _plain(f"{attention}linear_proj.weight", f"{theirs}o_proj.weight", output_shape)
    norms = [f"{here}mlp.linear_fc1.layer_norm_weight"]
    if has_experts:
        norms.insert(0 if prefers_own_norm else 1, f"{here}pre_mlp_layernorm.weight")
    yield Link(tuple(norms), (hidden,), (HfTensor(f"{there}post_attention_layernorm.weight", (hidden,)),))
    if not has_experts:
        yield from _mlp(f"{here}mlp.", f"{there}mlp.", hidden, config.intermediate_size)
        return
    yield _plain(f"{here}mlp.router.weight", f"{there}mlp.gate.weight", (config.num_experts, hidden))
    for expert in range(config.num_experts):
        yield from _mlp(
            f"{here}mlp.experts.experts.{expert}.",
            f"{there}mlp.experts.{expert}.",
            hidden,
            config.moe_intermediate_size,
        )


def _qkv(config: PretrainedConfig, here: str, there: str, kind: str, head_dim: int, columns: tuple[int, ...]) -> Link:
    groups = config.num_key_value_heads
    group_rows = (config.num_attention_heads // groups * head_dim, head_dim, head_dim)
    parts = (
        HfTensor(f"{there}{name}_proj.{kind}", (groups * rows, *columns))
        for name, rows in zip("qkv", group_rows, strict=True)
    )
    return Link((f"{here}linear_qkv.{kind}",), (groups * sum(group_rows), *columns), tuple(parts), group_rows)


def _mlp(here: str, there: str, hidden: int, inner: int) -> Iterator[Link]:
    yield _plain(f"{here}linear_fc1.weight_w", f"{there}gate_proj.weight", (inner, hidden))
    yield _plain(f"{here}linear_fc1.weight_v", f"{there}up_proj.weight", (inner, hidden))
    yield _plain(f"{here}linear_fc2.weight", f"{there}down_proj.weight", (hidden, inner))


def _check(config: PretrainedConfig) -> None:
    names = list(config.architectures or ())
    way_out = "convert a Qwen2, Qwen2.5, Qwen3, Qwen3-MoE or Llama model"
    if config.model_type not in _FAMILIES or not set(names) <= set(_ARCHITECTURES):
        told = ", ".join(names) or config.model_type
        raise ConfigError("config.json", told, "is no architecture that is converted", way_out)
    wanted = {**_WITHOUT, "quantization_config": None, "attention_bias": False}
    for field, value in wanted.items():
        found = getattr(config, field, value)
        if found not in (value, None):
            raise ConfigError(f"config.json: {field}", found, f"is converted only where it is {value}", way_out)
