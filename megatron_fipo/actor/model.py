"""Builds the actor: a megatron-core GPT model of the Hugging Face architecture, cut over the process grid."""

import dataclasses
import difflib
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module

from megatron_fipo.actor.layer_specs import decoder_block_spec
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.device import DTYPES, compute_device, uses_cuda, uses_transformer_engine

# Fields that belong to the run's own configuration, not to transformer_config_overrides.
_OWNED_FIELDS = frozenset(field.name for field in dataclasses.fields(ParallelismConfig)) | {
    "params_dtype",
    "bf16",
    "fp16",
    "rotary_base",
    "seq_length",
    "calculate_per_token_loss",
    "variable_seq_lengths",
    # Old and new log-probabilities come from two passes, which dropout would make differ.
    "hidden_dropout",
    "attention_dropout",
    # The architecture is the model folder's.
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "num_moe_experts",
    "normalization",
}


def build_provider(
    bridge: HfBridge, model: ModelConfig, parallelism: ParallelismConfig, context: ParallelContext
) -> Any:
    """The transformer configuration of the actor.

    Args:
        bridge: The model folder.
        model: Precision and overrides.
        parallelism: Process grid.
        context: This rank's place in it.

    Returns:
        A finalized megatron-bridge provider, which is a megatron-core TransformerConfig.

    Raises:
        ConfigError: The model cannot be cut this way, or an override names no field.
    """
    provider = bridge.provider()
    _check_divisibility(provider, parallelism)
    dtype = DTYPES[model.dtype]
    provider.params_dtype = provider.pipeline_dtype = dtype
    provider.autocast_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, False
    _set_parallelism(provider, parallelism)
    provider.transformer_layer_spec = decoder_block_spec
    provider.hidden_dropout = provider.attention_dropout = 0.0
    # The loss returns sums; megatron-core divides the reduced gradient by the global count, once.
    provider.calculate_per_token_loss = True
    provider.variable_seq_lengths = True
    provider.moe_token_dispatcher_type = "alltoall"
    # Off unless an override asks for it: per micro-batch, it depends on how sequences are packed.
    provider.moe_aux_loss_coeff = 0.0
    provider.cross_entropy_loss_fusion = False
    provider.gradient_accumulation_fusion = False
    if not uses_transformer_engine():
        _use_plain_kernels(provider)
    _apply_overrides(provider, model.transformer_config_overrides)
    provider._pg_collection = context.groups
    try:
        provider.finalize()
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            field="model.transformer_config_overrides",
            value=model.transformer_config_overrides,
            rule=f"megatron-core refuses this model with these sizes and overrides ({error})",
            way_out="change the override or the size that it names",
        ) from error
    return provider


def _set_parallelism(provider: Any, parallelism: ParallelismConfig) -> None:
    for field in (
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ):
        setattr(provider, field, getattr(parallelism, field))
    interleaved = parallelism.virtual_pipeline_model_parallel_size is not None
    provider.batch_p2p_comm = parallelism.batch_p2p_comm
    provider.overlap_p2p_comm = interleaved and not parallelism.batch_p2p_comm
    provider.should_pad_vocab = parallelism.tensor_model_parallel_size > 1
    if parallelism.activation_recompute != "none":
        provider.recompute_granularity = parallelism.activation_recompute
    if parallelism.activation_recompute == "full":
        provider.recompute_method, provider.recompute_num_layers = "uniform", 1


def _use_plain_kernels(provider: Any) -> None:
    """Turn off what needs Transformer Engine or other CUDA extensions."""
    for name in (
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "apply_rope_fusion",
        "moe_permute_fusion",
        "moe_grouped_gemm",
        "moe_router_fusion",
    ):
        setattr(provider, name, False)
    provider.use_cpu_initialization = not uses_cuda()
    provider.attention_backend = AttnBackend.auto
    provider.attention_softmax_in_fp32 = True


def _check_divisibility(provider: Any, parallelism: ParallelismConfig) -> None:
    tp, pp = parallelism.tensor_model_parallel_size, parallelism.pipeline_model_parallel_size
    groups = provider.num_query_groups or provider.num_attention_heads
    stages = pp * (parallelism.virtual_pipeline_model_parallel_size or 1)
    experts = provider.num_moe_experts or 1
    checks = (
        ("tensor_model_parallel_size", tp, "the model's attention heads", provider.num_attention_heads),
        ("tensor_model_parallel_size", tp, "the model's key-value heads", groups),
        ("pipeline_model_parallel_size", stages, "the model's layers", provider.num_layers),
        (
            "expert_model_parallel_size",
            parallelism.expert_model_parallel_size,
            "the model's experts",
            experts,
        ),
        (
            "expert_tensor_parallel_size",
            parallelism.expert_tensor_parallel_size,
            "the hidden size of the model's experts",
            provider.moe_ffn_hidden_size if provider.num_moe_experts else 1,
        ),
    )
    for field, size, what, count in checks:
        if count % size:
            raise ConfigError(
                field=f"parallelism.{field}",
                value=getattr(parallelism, field),
                rule=f"must divide {what}: {count} / {size} is not a whole number"
                + (" (pipeline × virtual stages)" if stages != pp and size == stages else ""),
                way_out=f"choose a divisor of {count}",
            )
    if provider.num_moe_experts and tp > 1 and not parallelism.sequence_parallel:
        raise ConfigError(
            field="parallelism.sequence_parallel",
            value=parallelism.sequence_parallel,
            rule=f"must be true for a mixture of experts with tensor_model_parallel_size = {tp}: megatron-core refuses "
            "to train it otherwise",
            way_out="set it to true",
        )


def _apply_overrides(provider: Any, overrides: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(provider)}
    for name, value in overrides.items():
        dotted = f"model.transformer_config_overrides.{name}"
        if name in _OWNED_FIELDS:
            raise ConfigError(
                field=dotted,
                value=value,
                rule="is set by the run's own sections or by the model folder",
                way_out="set it under model or parallelism, or leave it out",
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see megatron-core's TransformerConfig"
            raise ConfigError(field=dotted, value=value, rule="is no field of TransformerConfig", way_out=hint)
        setattr(provider, name, value)


def build_model(
    provider: Any, bridge: HfBridge, parallelism: ParallelismConfig, context: ParallelContext
) -> list[DistributedDataParallel]:
    """Build this rank's model chunks, fill them from the model folder, and wrap them for data parallelism.

    Args:
        provider: From `build_provider`.
        bridge: The model folder that the weights come from.
        parallelism: Process grid.
        context: This rank's place in it.

    Returns:
        One wrapped chunk, or one per virtual pipeline stage.
    """
    chunks = [_build_chunk(provider, context, stage) for stage in _virtual_stages(context)]
    bridge.load(chunks, context)
    if provider.bf16:
        chunks = [Float16Module(provider, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=shards_optimizer(parallelism, context),
        overlap_grad_reduce=parallelism.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
    )
    return [
        DistributedDataParallel(config=provider, ddp_config=ddp_config, module=chunk, disable_bucketing=(number > 0))
        for number, chunk in enumerate(chunks)
    ]


def shards_optimizer(parallelism: ParallelismConfig, context: ParallelContext) -> bool:
    """Whether optimizer state is sharded: as configured, where there is more than one rank to shard it over.

    On one rank megatron-core would still reduce-scatter the gradient, which costs gloo a copy of it.
    """
    return parallelism.use_distributed_optimizer and context.dp_cp_group.size() > 1


def _virtual_stages(context: ParallelContext) -> list[int | None]:
    return list(range(context.vpp_size)) if context.vpp_size > 1 else [None]


def _build_chunk(provider: Any, context: ParallelContext, stage: int | None) -> GPTModel:
    first = stage is None or stage == 0
    last = stage is None or stage == context.vpp_size - 1
    chunk = provider.provide(
        pre_process=first and is_pp_first_stage(context.pp_group),
        post_process=last and is_pp_last_stage(context.pp_group),
        vp_stage=stage,
    )
    return chunk.to(device=compute_device(), dtype=provider.params_dtype)


def unwrap(chunks: list[Any]) -> list[GPTModel]:
    """The bare models inside data-parallel and half-precision wrappers."""
    bare = []
    for chunk in chunks:
        while not isinstance(chunk, GPTModel):
            chunk = chunk.module
        bare.append(chunk)
    return bare
