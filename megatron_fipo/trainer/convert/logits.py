"""The logits of a Hugging Face folder, run by transformers, beside those of megatron-core's model of the checkpoint.

Both models compute in float32 and in the export's precision, from the same weights. Where a model does not fit the
memory, each of its layers is in memory only while it computes, on either side.

In a mixture of experts some tokens lie so close between two experts that two implementations choose differently, and
then have other logits. So the checkpoint's model sends tokens where transformers did. What the experts count is its own
router's, and so a router that is another one is seen.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.actor.layerwise import LayerwiseActor
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.load import CONFIG_FILE, load_config
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.conversion.bridge_import import import_bridge
from megatron_fipo.conversion.hf_folder import read_stored
from megatron_fipo.conversion.logit_check import Agreement, compare_logits
from megatron_fipo.conversion.transformers_run import TransformersRun, is_router
from megatron_fipo.parallel.agreement import on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.parallel.context import ParallelContext, build_parallel_context, destroy_parallel_context
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.convert.options import ConvertOptions
from megatron_fipo.trainer.convert.source import CheckpointSource, CheckpointWeights
from megatron_fipo.trainer.probe import Probe, probe_sequences

logger = logging.getLogger(__name__)

# ‖a − b‖ / ‖b‖ of the outputs of a part, in float32, from which on it is where two models part.
_PARTED = 1e-5


class LogitMismatchError(RunError):
    """Two models differ; the text says how much, and where that begins."""


def compare_models(
    source: CheckpointSource,
    weights: CheckpointWeights,
    folder: Path,
    options: ConvertOptions,
    scratch: Path | None = None,
    *,
    is_rounded: bool = False,
) -> list[str]:
    """Compare the logits of both models, on rank 0, while the others wait; collective.

    Args:
        source: The checkpoint.
        weights: Its weights.
        folder: The Hugging Face folder.
        options: How much memory models may take.
        scratch: Where transformers may put layers that it has to change; None is the system's place for such.
        is_rounded: Whether the checkpoint has fewer bits than the folder, so that both have the same weights in
            bfloat16 alone.

    Returns:
        How close they are, in lines.

    Raises:
        ConfigError: Transformers or megatron-core cannot build the model.
        LogitMismatchError: They differ; raised on every rank.
    """
    import_bridge()
    context = build_parallel_context(ParallelismConfig(), seed=0)
    try:
        told = on_main_rank(lambda: _Comparison(source, weights, folder, options, scratch).run(context, is_rounded))
    finally:
        destroy_parallel_context()
    lines, problem = broadcast_json(told, 0)
    if problem:
        raise LogitMismatchError(problem)
    return list(lines)


class _Comparison:
    """A pair of models on the same sequences."""

    def __init__(
        self,
        source: CheckpointSource,
        weights: CheckpointWeights,
        folder: Path,
        options: ConvertOptions,
        scratch: Path | None,
    ) -> None:
        self._source, self._weights = source, weights
        self._export = TransformersRun(folder, options.memory_bytes, scratch)
        stored = read_stored(folder)
        self._stored = stored
        self._exported_as = {weights.name_of(link): stored[link.hf[0].name].dtype for link in weights.links}
        self._sequences, self._kind = probe_sequences(folder, self._export.architecture.vocab_size, source.run)
        self._overrides = _overrides(source)

    def run(self, context: ParallelContext, is_rounded: bool) -> tuple[list[str], str]:
        """Compare; returns how close they are, in lines, and what is wrong or ""."""
        outputs: dict[str, Tensor] = {}
        exact = self._export.logits(self._sequences, torch.float32, outputs)
        lines: list[str] = []
        if not is_rounded:
            ours, parted = self._actor(torch.float32, context, outputs)
            agreement = compare_logits(ours, exact, torch.float32)
            lines.append(self._line(agreement))
            if not agreement.matches:
                where = self._says_nothing(agreement) or (parted and f"they part at {parted}")
                return lines, "; ".join(filter(None, (str(agreement), where)))
        if is_rounded or torch.bfloat16 in self._exported_as.values():
            outputs.clear()
            theirs = self._export.logits(self._sequences, torch.bfloat16, outputs)
            ours, _ = self._actor(torch.bfloat16, context, outputs)
            agreement = compare_logits(ours, theirs, torch.bfloat16, exact)
            lines.append(self._line(agreement))
            if not agreement.matches:
                return lines, "; ".join(filter(None, (str(agreement), self._says_nothing(agreement))))
        return lines, ""

    def _says_nothing(self, agreement: Agreement) -> str:
        """Why the folder's logits say nothing of its weights; "" where they do, or it is not the folder's fault."""
        if agreement.is_finite:
            return ""
        bad = [name for name, tensor in self._stored.items() if not tensor.read().isfinite().all()]
        if bad:
            return f"{bad[0]}{f' and {len(bad) - 1} more are' if len(bad) > 1 else ' is'} not finite"
        if agreement.scale == 0 and math.isfinite(agreement.largest):
            return "all of the folder's are 0, which says nothing of its weights: compare these with --verify bytes"
        return ""

    def _line(self, agreement: Agreement) -> str:
        how = "" if self._export.fits(agreement.dtype) else ", layer by layer"
        return f"logits on {self._kind}: {agreement}{how}"

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
        actor = LayerwiseActor(bridge, settings, context, self._read, keeps_weights=self._export.fits(dtype))
        probe = Probe(self._sequences, ParallelismConfig(), context)
        if experts := [output for name, output in outputs.items() if is_router(name)]:
            probe.send_to(experts)
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
        actor.close()
        return logits, parted[0] if parted else ""

    def _read(self, name: str) -> Tensor:
        return self._weights.read_by_name(name).to(self._exported_as[name])


def _overrides(source: CheckpointSource) -> dict[str, Any]:
    """What the run set in megatron-core's configuration beside the model's own description."""
    path = source.path / CONFIG_FILE
    try:
        return load_config(RunConfig, path).model.transformer_config_overrides if path.is_file() else {}
    except ConfigError as error:
        # Of another release, perhaps. If they matter, the logits will tell.
        logger.warning("%s cannot be read, so that the model is compared without the run's overrides: %s", path, error)
        return {}
