"""The logits of a Hugging Face folder, run by transformers, beside those of megatron-core's model of the checkpoint.

Both models compute in the export's precision and in float32, from the same weights. Where a model does not fit the
memory, each of its layers is in memory only while it computes, on either side.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_fipo.actor.layerwise import LayerwiseActor
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.load import load_config
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.conversion.bridge_import import import_bridge
from megatron_fipo.conversion.hf_folder import weight_files
from megatron_fipo.conversion.logit_check import Agreement, compare_logits
from megatron_fipo.conversion.model_files import read_architecture
from megatron_fipo.conversion.safetensors_file import stored_tensors
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.parallel.context import ParallelContext, build_parallel_context, destroy_parallel_context
from megatron_fipo.platform.device import compute_device
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.agreement import on_every_rank
from megatron_fipo.trainer.convert.options import ConvertOptions
from megatron_fipo.trainer.convert.prompts import probe_sequences
from megatron_fipo.trainer.convert.source import CheckpointSource, CheckpointWeights
from megatron_fipo.trainer.probe import Probe

logger = logging.getLogger(__name__)

# ‖a − b‖ / ‖b‖ of the outputs of a layer, in float32, from which on it is where two models part.
_PARTED = 1e-5
# Of the memory that is free, what models may take.
_FREE_SHARE = 0.8


class LogitMismatchError(RunError):
    """Two models differ; the text says how much, and where that begins."""


def compare_models(
    source: CheckpointSource,
    weights: CheckpointWeights,
    folder: Path,
    options: ConvertOptions,
    scratch: Path | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[str]:
    """Compare the logits in every precision, each on a rank of its own where there are several; collective.

    Args:
        source: The checkpoint.
        weights: Its weights.
        folder: The Hugging Face folder.
        options: How much memory models may take.
        scratch: Where transformers may put layers that it has to change; None is the system's place for such.
        dtypes: Precisions to compute in; None is float32 and the folder's.

    Returns:
        How close they are, in lines.

    Raises:
        ConfigError: Transformers or megatron-core cannot build the model.
        LogitMismatchError: They differ; raised on every rank.
    """
    comparison = on_every_rank(lambda: _Comparison(source, weights, folder, options, scratch))
    import_bridge()
    context = build_parallel_context(ParallelismConfig(), seed=0)
    try:
        mine = (dtypes or comparison.dtypes)[dist.get_rank() :: dist.get_world_size()]
        found = on_every_rank(lambda: [comparison.run(dtype, context) for dtype in mine])
    finally:
        destroy_parallel_context()
    for problem in (problem for _, problem in _all(found) if problem):
        raise LogitMismatchError(problem)
    return [f"logits on {comparison.kind}: {text}" for text, _ in _all(found)]


def _all(found: list[list[str]]) -> list[list[str]]:
    by_rank = gather_json(found)
    longest = max(map(len, by_rank))
    return [each[number] for number in range(longest) for each in by_rank if number < len(each)]


class _Comparison:
    """All that the comparisons of a pair have in common.

    Attributes:
        dtypes: Precisions to compute in.
        kind: What the sequences are.
    """

    def __init__(
        self,
        source: CheckpointSource,
        weights: CheckpointWeights,
        folder: Path,
        options: ConvertOptions,
        scratch: Path | None,
    ) -> None:
        self._source, self._weights, self._folder, self._scratch = source, weights, folder, scratch
        self._architecture = read_architecture(folder)
        stored = {each.name: each for path in weight_files(folder) for each in stored_tensors(path)}
        self._exported_as = {weights.name_of(link): stored[link.hf[0].name].dtype for link in weights.links}
        self._num_parameters = sum(tensor.num_elements for link in weights.links for tensor in link.hf)
        self._memory = options.memory_bytes or int(_FREE_SHARE * psutil.virtual_memory().available)
        sequences = probe_sequences(folder, self._architecture.vocab_size, source.run)
        self._sequences, self.kind = sequences
        is_bfloat16 = torch.bfloat16 in self._exported_as.values()
        self.dtypes = [torch.float32, *([torch.bfloat16] if is_bfloat16 else [])]
        self._overrides = _overrides(source)

    def run(self, dtype: torch.dtype, context: ParallelContext) -> list[str]:
        """Compare in one precision.

        Returns:
            How close the models are, and what is wrong or "".
        """
        outputs: dict[str, Tensor] = {}
        theirs = self._transformers(dtype, outputs)
        ours, parted = self._actor(dtype, context, outputs)
        agreement = compare_logits(ours, theirs, dtype)
        text = str(agreement) + ("" if self._fits(dtype) else ", layer by layer")
        return [text, "" if agreement.matches else _told(agreement, parted)]

    def _fits(self, dtype: torch.dtype) -> bool:
        return self._num_parameters * dtype.itemsize <= self._memory

    def _transformers(self, dtype: torch.dtype, outputs: dict[str, Tensor]) -> list[Tensor]:
        """Logits [L, V] of the folder; the outputs of its parts, rows of all sequences, are put into `outputs`."""
        disable_progress_bar()
        with self._placed(dtype) as place:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **place
            )
            model = model.eval() if place else model.to(compute_device()).eval()
            parts: dict[str, list[Tensor]] = {}
            for name, part in _parts_of_transformers(model.model):
                mine = parts.setdefault(name, [])
                part.register_forward_hook(lambda _, __, output, mine=mine: mine.append(_rows(output)[0].cpu()))
            with torch.no_grad():
                sequences = [torch.tensor([ids], device=compute_device()) for ids in self._sequences]
                logits = [model(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in sequences]
        outputs |= {name: torch.cat(mine) for name, mine in parts.items()}
        return logits

    @contextmanager
    def _placed(self, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
        """How transformers is told where the weights are: with each layer on disk until it is entered, or as usual."""
        if self._fits(dtype):
            yield {}
            return
        config = self._architecture
        # Accelerate knows a tied matrix under one name alone, so that it stays in memory.
        ends = "cpu" if config.tie_word_embeddings else "disk"
        places = {"model.embed_tokens": ends, "lm_head": ends, "model.norm": "disk", "model.rotary_emb": "cpu"}
        places |= {f"model.layers.{layer}": "disk" for layer in range(config.num_hidden_layers)}
        # Transformers puts a layer's experts, which it stacks, into files of its own.
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix=".offload_") as scratch:
            yield {"device_map": places, "offload_folder": scratch}

    def _actor(
        self, dtype: torch.dtype, context: ParallelContext, outputs: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], str]:
        """Logits of the checkpoint, and the part of the model whose output is the first to differ from `outputs`."""
        settings = ModelConfig(
            path=self._source.model_folder,
            dtype="float32" if dtype == torch.float32 else "bfloat16",
            transformer_config_overrides=self._overrides,
        )
        bridge = HfBridge(self._source.model_folder, has_weights=False)
        actor = LayerwiseActor(bridge, settings, context, self._read, keeps_weights=self._fits(dtype))
        probe = Probe(self._sequences, ParallelismConfig(), context)
        parted: list[str] = []

        def observe(name: str, output: Tensor) -> None:
            mine, other = probe.rows(output.squeeze(1)).float().cpu(), outputs[name].float()
            difference = (mine - other).norm() / other.norm()
            # Not "above": what is no number is a difference, too.
            if not difference <= _PARTED:
                parted.append(f"{name} (relative norm {difference:.1e})")

        if dtype == torch.float32:
            actor.observe(observe)
        logits = [each.cpu() for each in probe.logits(actor.forward)]
        return logits, parted[0] if parted else ""

    def _read(self, name: str) -> Tensor:
        return self._weights.read_by_name(name).to(self._exported_as[name])


def _told(agreement: Agreement, parted: str) -> str:
    return f"{agreement}" + (f"; they part at {parted}" if parted else "")


def _parts_of_transformers(model: Any) -> Iterator[tuple[str, Any]]:
    yield "model.embed_tokens", model.embed_tokens
    for number, layer in enumerate(model.layers):
        yield f"model.layers.{number}.self_attn", layer.self_attn
        yield f"model.layers.{number}", layer
    yield "model.norm", model.norm


def _rows(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _overrides(source: CheckpointSource) -> dict[str, Any]:
    """What the run set in megatron-core's configuration beside the model's own description."""
    path = source.path / "config.yaml"
    try:
        return load_config(RunConfig, path).model.transformer_config_overrides if path.is_file() else {}
    except ConfigError as error:
        # Of another release, perhaps. If they matter, the logits will tell.
        logger.warning("%s cannot be read, so that the model is compared without the run's overrides: %s", path, error)
        return {}
