"""The trained model as a Hugging Face folder, put in place only after its logits matched the actor's."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.actor.model import unwrap
from megatron_fipo.config.algorithm_card import CARD_FILE, effective_algorithm
from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.hf_folder import HfFolderWriter
from megatron_fipo.conversion.logit_check import Agreement, compare_logits
from megatron_fipo.conversion.model_card import CARD_NAME, ModelCard
from megatron_fipo.conversion.model_files import model_name
from megatron_fipo.conversion.transformers_run import TransformersRun
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told
from megatron_fipo.runtime.files.json_files import read_whole_lines
from megatron_fipo.trainer.probe import Probe, probe_sequences
from megatron_fipo.trainer.state import Run

logger = logging.getLogger(__name__)


class ExportError(RunError):
    """An export that cannot be written, does not read back, or whose logits differ from the actor's. There is none."""


def export_when_done(run: Run) -> None:
    """Write and verify the export after the last step; collective over all ranks.

    Raises:
        ExportError: It cannot be written, its tensors do not read back, or its logits differ from the actor's; raised
            on every rank.
    """
    config = run.config.checkpoint
    if not config.export_at_end or run.actor.train_step is None:
        return
    if any(gather_json(run.directory is not None and run.directory.export.exists())):
        # Of a run that had come to its end before.
        return
    dtype = DTYPES[config.export_dtype]
    if run.rollout is not None:
        run.rollout.leave_devices()
    with run.timer.phase("export"):
        writer = _write(run, dtype)
        try:
            proof = _verify(run, writer, dtype) if config.verify_export else []
            on_main_rank(lambda: _complete(run, writer, dtype, proof))
        except RunError:
            if writer is not None:
                writer.folder.abandon()
            raise


def _write(run: Run, dtype: torch.dtype) -> HfFolderWriter | None:
    """Write the partial folder on rank 0, which has the writer, while all ranks feed the stream."""
    bridge = run.actor.bridge
    stream = bridge.export(unwrap(run.actor.chunks), dtype)
    num_bytes = sum(math.prod(shape) for shape in bridge.shapes.values()) * dtype.itemsize
    writer = None
    if run.directory is not None:
        writer = HfFolderWriter(
            run.directory.export,
            bridge.folder,
            bridge.export_config(dtype),
            remembers=run.config.checkpoint.verify_export,
        )

    def write() -> None:
        try:
            if writer is not None:
                with _told(writer.partial, "cannot be written"):
                    writer.write(stream, num_bytes)
        finally:
            # All ranks take part to the end, whatever has happened on rank 0.
            for _ in stream:
                pass

    on_every_rank(write)
    return writer


def _complete(run: Run, writer: HfFolderWriter | None, dtype: torch.dtype, proof: Sequence[str]) -> None:
    """Give the export its cards and its name."""
    assert writer is not None, "rank 0 has it"
    with _told(writer.partial, "cannot be completed"):
        _write_cards(run, writer.partial, dtype, proof)
        writer.folder.commit()
    logger.info("exported the model to %s", writer.folder.target)


def _write_cards(run: Run, folder: Path, dtype: torch.dtype, proof: Sequence[str]) -> None:
    assert run.directory is not None, "rank 0 has the run directory"
    algorithm = effective_algorithm(run.config.algorithm)
    metrics = read_whole_lines(run.directory.path / "metrics.jsonl")[0]
    card = ModelCard(
        base_model=model_name(run.actor.bridge.folder),
        step=max((line.get("step", 0) for line in metrics), default=0),
        dtype=str(dtype).removeprefix("torch."),
        algorithm=algorithm,
        metrics=metrics,
        proof=proof,
    )
    (folder / CARD_FILE).write_text(algorithm + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(card.text(), encoding="utf-8")


def _verify(run: Run, writer: HfFolderWriter | None, dtype: torch.dtype) -> list[str]:
    """Compare what was written with the disk, and its logits with the actor's; collective.

    The rank that ends the first replica's pipeline has the actor's logits, and judges.

    Returns:
        What was found equal, in lines.
    """
    faults = broadcast_json(on_main_rank(lambda: _faults(writer)), 0)
    paths = None if writer is None else [str(writer.folder.target), str(writer.partial)]
    target, folder = broadcast_json(paths, 0)
    if faults:
        raise ExportError(f"{target}: {len(faults)} tensors do not read back as they were written: {faults[0]}")
    context, bridge = run.context, run.actor.bridge
    chosen = probe_sequences(bridge.folder, bridge.vocab_size, run.config.output_dir) if run.is_main else None
    sequences, kind = broadcast_json(chosen, 0)
    with _weights_rounded_to(dtype, unwrap(run.actor.chunks)):
        probe = Probe(sequences, run.config.parallelism, context)
        logits = [each.cpu() for each in probe.logits(run.actor.forward)]
    judges = gather_json(context.is_pipeline_last_stage and not (context.tp_rank or context.cp_rank or context.dp_rank))
    judge = judges.index(True)
    computed_in = run.actor.forward.provider.params_dtype

    def judged() -> tuple[bool, str] | None:
        if context.rank != judge:
            return None
        with _told(Path(folder), "cannot be read"):
            agreement = _compare(TransformersRun(Path(folder)), sequences, logits, computed_in)
        return agreement.matches, str(agreement)

    matches, text = broadcast_json(on_every_rank(judged), judge)
    if not matches:
        raise ExportError(f"{target}: its logits differ from the actor's ({text}); there is no export")
    logger.info("the export's logits match the actor's: %s", text)
    return ["every tensor reads back as the actor gave it (SHA-256)", f"logits on {kind}: {text}"]


def _faults(writer: HfFolderWriter | None) -> list[str]:
    assert writer is not None, "rank 0 has it"
    with _told(writer.partial, "cannot be read"):
        return writer.check_bytes()


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """Errors of the file system, and of a folder that is no model, become the export's own."""
    try:
        with disk_errors_told(folder, what, ExportError):
            yield
    except ConfigError as error:
        raise ExportError(str(error)) from error


def _compare(
    export: TransformersRun, sequences: Sequence[Sequence[int]], logits: Sequence[Tensor], dtype: torch.dtype
) -> Agreement:
    theirs = export.logits(sequences, dtype)
    has_experts = hasattr(export.architecture, "num_experts")
    agreement = compare_logits(logits, theirs, dtype, may_reroute=has_experts)
    if agreement.matches or dtype == torch.float32:
        return agreement
    # It may be rounding, of which there is the more the deeper a model is.
    return compare_logits(logits, theirs, dtype, export.logits(sequences, torch.float32), may_reroute=has_experts)


@contextmanager
def _weights_rounded_to(dtype: torch.dtype, chunks: list[Any]) -> Iterator[None]:
    """Round the actor's weights to `dtype` for the time being, as the export did."""
    saved: list[tuple[Tensor, Tensor]] = []
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.dtype != dtype and parameter.dtype == torch.float32:
                saved.append((parameter.data, parameter.data.clone()))
                parameter.data.copy_(parameter.data.to(dtype))
    try:
        yield
    finally:
        for live, original in saved:
            live.copy_(original)
