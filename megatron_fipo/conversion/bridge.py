"""Hugging Face folder ↔ megatron-core model, on megatron-bridge.

Loading: every tensor is read from disk by one rank (the tensor-parallel leader of the first replica that holds it),
scattered inside its tensor-parallel group, and broadcast to the other replicas. Exporting: a stream of full tensors
under their Hugging Face names, in which every rank takes part.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.bridge_import import import_bridge
from megatron_fipo.conversion.hf_folder import (
    EMBEDDING_NAME,
    OUTPUT_NAME,
    SINGLE_NAME,
    check_weights,
    model_config_for,
    read_model_config,
    read_weight_map,
)
from megatron_fipo.conversion.model_files import write_model_files
from megatron_fipo.conversion.stage_export import StageExport
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.host_memory import require_resident

_VOCABULARY_TENSORS = (EMBEDDING_NAME, OUTPUT_NAME)
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class HfBridge:
    """One Hugging Face model folder and its translation to megatron-core.

    Args:
        folder: Model folder with config.json and safetensors.
        context_length: Overrides the longest position, here and in every export.
        rope_base: Overrides the base of the rotary embedding, here and in every export.
        has_weights: Whether the folder has weights; without any, as in a checkpoint, there is a `provider` alone.

    Raises:
        ConfigError: The folder is missing, incomplete, or of an architecture that cannot be translated.
    """

    def __init__(
        self,
        folder: Path,
        context_length: int | None = None,
        rope_base: float | None = None,
        *,
        has_weights: bool = True,
    ) -> None:
        self.folder = folder
        self.source_config = read_model_config(folder)
        self.shapes = check_weights(folder) if has_weights else {}
        self._context_length, self._rope_base = context_length, rope_base
        auto_bridge = import_bridge().AutoBridge
        try:
            # megatron-bridge would try four times, with pauses, and blame the network.
            AutoConfig.from_pretrained(folder, local_files_only=True)
            self._bridge = auto_bridge.from_hf_pretrained(str(folder))
        except ValueError as error:
            names = ", ".join(self.source_config.get("architectures") or ["no architecture is named"])
            raise ConfigError(
                field="model.path",
                value=str(folder),
                rule=f"must be an architecture that megatron-bridge translates ({names}: {_first_line(error)})",
                way_out="choose a supported architecture, such as Qwen2, Qwen3, Qwen3-MoE or Llama",
            ) from error
        self._export_tasks: Any = None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding in the Hugging Face model, before any padding."""
        return int(self.source_config["vocab_size"])

    def provider(self) -> Any:
        """A fresh megatron-bridge provider (a TransformerConfig that can build the model), overrides applied."""
        provider = self._bridge.to_megatron_provider(load_weights=False)
        provider.seq_length = self._context_length or int(self.source_config["max_position_embeddings"])
        if self._rope_base is not None:
            provider.rotary_base = self._rope_base
        return provider

    def export_config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Contents of config.json for an export in `dtype`, overrides applied."""
        name = str(dtype).removeprefix("torch.")
        return model_config_for(self.source_config, name, self._context_length, self._rope_base)

    def write_model_files(self, folder: Path, dtype: torch.dtype) -> None:
        """Make the folder of a checkpoint that describes the model: see `conversion/model_files.py`.

        Args:
            folder: The folder; made here.
            dtype: Precision of the checkpoint's weights.

        Raises:
            OSError: It cannot be written.
        """
        write_model_files(folder, self.folder, self.export_config(dtype))

    def load(self, model: list[Any], context: ParallelContext) -> None:
        """Fill the model chunks from the folder; collective over all ranks.

        Raises:
            ConfigError: The folder lacks a tensor that the model needs.
        """
        translation = self._bridge._model_bridge
        tasks = translation.build_conversion_tasks(self._bridge.hf_pretrained, model)
        self._check_complete(tasks)
        source = _LazySource(self.folder, self.shapes, context)
        for task in tasks:
            if task.megatron_module is None:
                continue
            weights = translation.maybe_modify_loaded_hf_weight(task.mapping.hf_param, source)
            shard = task.mapping.hf_to_megatron(weights, task.megatron_module)
            with torch.no_grad():
                task.param_weight.copy_(shard)
        _share_tied_embedding(model, context)
        for chunk in model:
            for parameter in chunk.parameters():
                is_expert = not getattr(parameter, "allreduce", True)
                group = context.groups.expt_dp if is_expert else context.dp_cp_group
                if group.size() > 1:
                    dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)

    def _check_complete(self, tasks: list[Any]) -> None:
        needed: set[str] = set()
        for task in tasks:
            names = task.mapping.hf_param
            needed.update([names] if isinstance(names, str) else names.values())
        absent = sorted(name for name in needed if name not in self.shapes and "*" not in name)
        if absent:
            raise ConfigError(
                field="model.path",
                value=str(self.folder),
                rule=f"lacks {len(absent)} tensors that the model needs, {absent[0]} first",
                way_out="fetch the model's weight files again, or check config.json (tie_word_embeddings?)",
            )

    def export(self, model: list[Any], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Stream (Hugging Face name, full tensor) pairs; every rank takes part and every rank gets every tensor.

        Args:
            model: Model chunks of this rank, without data-parallel wrappers.
            dtype: Type of the tensors; by default the parameters' own.

        Yields:
            Pairs in a fixed order, padding rows of the vocabulary trimmed. A tensor may be a view of a live parameter:
            copy it to keep it.

        Raises:
            RunError: The parameters are off the device.
        """
        require_resident((each for chunk in model for each in chunk.parameters()), "the actor's weights")
        if self._export_tasks is None:
            bridge = self._bridge
            self._export_tasks = bridge._model_bridge.build_conversion_tasks(bridge.hf_pretrained, model)
        stream = self._bridge.export_hf_weights(
            model, cpu=False, show_progress=False, conversion_tasks=self._export_tasks
        )
        for name, tensor in stream:
            tensor = self._trim(name, tensor)
            yield name, tensor.detach() if dtype is None else tensor.detach().to(dtype)

    def stage_export(self, model: list[Any], context: ParallelContext) -> StageExport:
        """What streams this rank's pipeline stage to the stage's sender; made by all ranks together.

        Together the stages' streams are `export`'s: each tensor once, a tied embedding on the first stage.

        Args:
            model: Model chunks of this rank, without data-parallel wrappers.
            context: This rank's place.

        Raises:
            ConfigError: The checkpoint keeps a layer's experts in one tensor.
        """
        return StageExport(self._bridge, model, context, self._trim)

    def _trim(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[: self.vocab_size] if name in _VOCABULARY_TENSORS else tensor


class _LazySource(Mapping[str, Tensor]):
    """The folder's tensors for megatron-bridge, read only on the rank whose copy is used.

    Elsewhere it hands out uninitialised memory of the right shape, which megatron-bridge overwrites or ignores.
    """

    def __init__(self, folder: Path, shapes: dict[str, list[int]], context: ParallelContext) -> None:
        self._folder, self._shapes = folder, shapes
        groups = context.groups
        self._reads_dense = context.tp_rank == 0 and context.dp_cp_group.rank() == 0
        self._reads_experts = groups.expt_tp.rank() == 0 and groups.expt_dp.rank() == 0
        self._files = read_weight_map(folder)

    def __getitem__(self, key: str) -> Tensor:
        reads = self._reads_experts if ".experts." in key else self._reads_dense
        with safe_open(self._folder / self._files.get(key, SINGLE_NAME), framework="pt") as file:
            if reads:
                return file.get_tensor(key)
            dtype = _SAFETENSORS_DTYPES[file.get_slice(key).get_dtype()]
        return torch.empty(self._shapes[key], dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _share_tied_embedding(model: list[Any], context: ParallelContext) -> None:
    """Give the last pipeline stage's copy of a tied embedding the first stage's values."""
    if context.pp_size == 1 or not model[0].share_embeddings_and_output_weights:
        return
    if context.pp_rank == 0:
        weight = model[0].embedding.word_embeddings.weight
    elif context.is_pipeline_last_stage:
        weight = model[-1].output_layer.weight
    else:
        return
    group = context.groups.embd
    dist.broadcast(weight.data, src=dist.get_global_rank(group, 0), group=group)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
