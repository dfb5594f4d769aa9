"""Which modules the transformer is built from: Transformer Engine's where it can run, ours elsewhere."""

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fipo.actor.local_layers import PackedDotProductAttention, SequenceParallelRMSNorm
from megatron_fipo.platform.device import uses_transformer_engine


def decoder_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Modules of this rank's part of the decoder.

    Args:
        config: The model's configuration; mixture-of-experts layers follow its `moe_layer_freq`.
        vp_stage: Virtual pipeline stage, where there are several.

    Raises:
        ValueError: Local layers were asked to norm by something other than RMSNorm.
    """
    if uses_transformer_engine():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    if config.normalization != "RMSNorm":
        raise ValueError(
            f"normalization = {config.normalization}: without Transformer Engine only RMSNorm is supported; "
            "choose a model with RMSNorm, or install Transformer Engine on CUDA"
        )
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        _use_local_parts(layer, config)
    block.layer_norm = SequenceParallelRMSNorm
    return block


def _use_local_parts(layer: ModuleSpec, config: TransformerConfig) -> None:
    parts = layer.submodules
    parts.input_layernorm = SequenceParallelRMSNorm
    parts.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedDotProductAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
