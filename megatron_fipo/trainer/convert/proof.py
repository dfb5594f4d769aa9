"""Whether a Hugging Face folder is what a checkpoint holds: every tensor's bytes, and the logits of both models."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.hf_folder import (
    EMBEDDING_NAME,
    OUTPUT_NAME,
    fault_of_tied_output,
    read_model_config,
    read_stored,
)
from megatron_fipo.conversion.safetensors_file import StoredTensor, TensorRecord, fault_of, record_of
from megatron_fipo.parallel.agreement import on_every_rank
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.trainer.convert.logits import LogitMismatchError, compare_models
from megatron_fipo.trainer.convert.options import ConversionError, ConvertOptions, told
from megatron_fipo.trainer.convert.shares import my_share
from megatron_fipo.trainer.convert.source import CheckpointSource, CheckpointWeights

logger = logging.getLogger(__name__)

_NAMED = 5
_ROUNDED = "fewer bits in the checkpoint"
# What may differ between two descriptions of one model.
_FREE = frozenset({"dtype", "torch_dtype", "transformers_version", "_name_or_path"})


def prove(
    source: CheckpointSource,
    weights: CheckpointWeights,
    folder: Path,
    options: ConvertOptions,
    scratch: Path | None = None,
    records: dict[str, TensorRecord] | None = None,
) -> list[str]:
    """Compare as the options ask; collective over all ranks, which share the work.

    Args:
        source: The checkpoint.
        weights: Its weights.
        folder: The Hugging Face folder.
        options: What is compared, and in how much memory.
        scratch: Where a model that does not fit the memory may put parts of it; None is the system's place for such.
        records: What the folder's tensors must be, where that is known; else they are made from the checkpoint.

    Returns:
        What was compared and found equal, in lines.

    Raises:
        ConfigError: The folder is incomplete.
        ConversionError: Something differs; raised on every rank.
    """
    found: list[str] = []
    if options.verify == "nothing":
        return found
    stored = on_every_rank(lambda: _stored(folder))
    num_rounded = 0
    if options.verify != "logits":
        differing, num_rounded = _differing(weights, stored, records)
        if differing:
            raise ConversionError(f"{folder} differs from {source.path}: {_listed(differing)}")
        precision = f", {num_rounded} of them rounded to the checkpoint's precision" if num_rounded else ""
        found.append(f"{len(stored)} tensors have the checkpoint's shapes and bytes (SHA-256){precision}")
    if options.verify != "bytes":
        found += _prove_logits(source, weights, folder, options, scratch, is_rounded=num_rounded > 0)
    if dist.get_rank() == 0:
        for line in found:
            logger.info("%s: %s", folder, line)
    return found


def _prove_logits(
    source: CheckpointSource,
    weights: CheckpointWeights,
    folder: Path,
    options: ConvertOptions,
    scratch: Path | None,
    *,
    is_rounded: bool,
) -> list[str]:
    try:
        return compare_models(source, weights, folder, options, scratch, is_rounded=is_rounded)
    except LogitMismatchError as error:
        # Every rank has the error, and all look for the reason.
        differing, _ = _differing(weights, on_every_rank(lambda: _stored(folder)), None)
        reasons = [*differing, *_differing_settings(source.model_folder, folder)]
        cause = _listed(reasons) if reasons else "every tensor and setting is the checkpoint's"
        raise ConversionError(f"{folder}: its logits differ from those of {source.path}: {error}; {cause}") from error


def _stored(folder: Path) -> dict[str, StoredTensor]:
    with told(folder, "cannot be read"):
        return read_stored(folder)


def _differing(
    weights: CheckpointWeights, stored: dict[str, StoredTensor], records: dict[str, TensorRecord] | None
) -> tuple[list[str], int]:
    """What is wrong with the folder's tensors, of which every rank reads a share, and how many are rounded; collective.

    A checkpoint that was made with fewer bits than its source has each tensor rounded.
    """
    names = {tensor.name for link in weights.links for tensor in link.hf}
    # Some folders have a tied output matrix a second time, and transformers computes with it if it differs.
    has_tied = OUTPUT_NAME in stored and OUTPUT_NAME not in names
    problems = [f"{name} is missing" for name in sorted(names - stored.keys())]
    problems += [f"{name} is no tensor of the model" for name in sorted(stored.keys() - names - {OUTPUT_NAME})]
    if problems:
        return problems, 0

    def share() -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if has_tied and dist.get_rank() == 0:
            with told(stored[OUTPUT_NAME].path, "cannot be read"):
                fault = fault_of_tied_output(stored)
            found += [(OUTPUT_NAME, f"{fault}, though it is tied to {EMBEDDING_NAME}")] if fault else []
        sizes = [sum(stored[tensor.name].num_bytes for tensor in link.hf) for link in weights.links]
        for number in my_share(sizes):
            link = weights.links[number]
            parts = itertools.repeat(None) if records is not None else link.split(weights.read(link))
            for tensor, part in zip(link.hf, parts, strict=False):
                with told(stored[tensor.name].path, "cannot be read"):
                    wanted = None if records is None else records[tensor.name]
                    fault = _fault(stored[tensor.name], part, wanted)
                found += [(tensor.name, fault)] if fault else []
        return found

    told_by_all = sorted(itertools.chain.from_iterable(gather_json(on_every_rank(share))))
    faults = [f"{name} has {fault}" for name, fault in told_by_all if fault != _ROUNDED]
    return faults, len(told_by_all) - len(faults)


def _fault(stored: StoredTensor, part: Tensor | None, wanted: TensorRecord | None) -> str:
    """What is wrong with a tensor of the folder, `_ROUNDED`, or "".

    Args:
        stored: The tensor.
        part: The checkpoint's; read where it is not known what the tensor must be.
        wanted: What it must be, where that is known.
    """
    found = stored.record()
    if wanted is None:
        assert part is not None, "the checkpoint's tensor was read"
        wanted = record_of(part, stored.dtype)
        if found != wanted and found.shape == wanted.shape and part.dtype.itemsize < stored.dtype.itemsize:
            found, wanted = record_of(stored.read(), part.dtype), record_of(part, part.dtype)
            if found == wanted:
                return _ROUNDED
    return fault_of(found, wanted)


def _differing_settings(checkpoint: Path, folder: Path) -> list[str]:
    """Settings of config.json that are not the checkpoint's."""
    try:
        ours, theirs = read_model_config(checkpoint), read_model_config(folder)
    except ConfigError as error:
        return [str(error)]
    return [
        f"config.json has {key} = {theirs.get(key)!r}, and the checkpoint {ours.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if key not in _FREE and ours.get(key) != theirs.get(key)
    ]


def _listed(problems: Sequence[str]) -> str:
    more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return ", ".join(problems[:_NAMED]) + more
