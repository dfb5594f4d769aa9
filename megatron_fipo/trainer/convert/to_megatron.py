"""A Hugging Face folder becomes a checkpoint of weights alone, tensor by tensor, which any process grid loads."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor.checkpoint_stream import TensorPlace, tensor_file_name, write_tensor_file, write_tensor_index
from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.conversion.hf_folder import OUTPUT_NAME, model_config_for, read_model_config, read_stored
from megatron_fipo.conversion.model_files import MODEL_FOLDER, check_tied_output, read_architecture, write_model_files
from megatron_fipo.conversion.safetensors_file import StoredTensor
from megatron_fipo.conversion.tensor_map import Link, tensor_map
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.platform.device import DTYPES, uses_transformer_engine
from megatron_fipo.runtime.checkpoint_store import write_manifest
from megatron_fipo.runtime.files.hashed_file import FileRecord
from megatron_fipo.runtime.files.whole_folder import WholeFolder
from megatron_fipo.trainer.checkpointing import ACTOR_FOLDER
from megatron_fipo.trainer.convert.options import ConvertOptions, told
from megatron_fipo.trainer.convert.proof import prove
from megatron_fipo.trainer.convert.shares import cut_into_files, my_share
from megatron_fipo.trainer.convert.source import CheckpointSource

logger = logging.getLogger(__name__)

# A tensor's archive in a checkpoint is a little larger than the tensor.
_BYTES_PER_TENSOR = 4096


def to_megatron(source: Path, target: Path, options: ConvertOptions) -> None:
    """Write and prove the checkpoint; collective over all ranks.

    Args:
        source: A Hugging Face model folder.
        target: The checkpoint to write.
        options: How.

    Raises:
        ConfigError: The source is incomplete or none that is converted, or the target is taken or too small.
        ConversionError: The checkpoint cannot be written, or differs from the source. There is none then.
    """
    model = on_every_rank(lambda: _HfWeights(source, options))
    on_main_rank(lambda: check_tied_output(source))
    folder = WholeFolder(target, "OUT")
    on_main_rank(lambda: _begin(folder, sum(model.sizes)))
    try:
        files, places = _write_files(model, folder.partial / ACTOR_FOLDER, options)
        on_main_rank(lambda: _complete(model, folder.partial, files, places))
        written = CheckpointSource(folder.partial, 0)
        prove(written, on_every_rank(written.weights), source, options, folder.partial)
        on_main_rank(lambda: _commit(folder))
    except BaseException:
        if dist.get_rank() == 0:
            folder.abandon()
        raise
    if dist.get_rank() == 0:
        logger.info("%s is now the checkpoint %s", source, target)


class _HfWeights:
    """A model folder by the links that it is converted by."""

    def __init__(self, folder: Path, options: ConvertOptions) -> None:
        self.folder = folder
        self.links = tensor_map(read_architecture(folder), prefers_own_norm=uses_transformer_engine())
        with told(folder, "cannot be read"):
            stored = read_stored(folder)
        self._stored = self._fitting(stored)
        self.dtype = self._dtype(options)
        elements = [sum(tensor.num_elements for tensor in link.hf) for link in self.links]
        self.sizes = [count * self.dtype.itemsize + _BYTES_PER_TENSOR for count in elements]

    def read(self, links: Sequence[Link]) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors as a checkpoint has them, one at a time."""
        for link in links:
            parts = [self._stored[tensor.name].read().to(self.dtype) for tensor in link.hf]
            whole = link.join(parts)
            del parts
            yield link.name, whole

    def _fitting(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        wanted = {tensor.name: tensor for link in self.links for tensor in link.hf}
        for name, tensor in wanted.items():
            found = stored.get(name)
            if found is None or found.shape != tensor.shape:
                has = "lacks" if found is None else f"has with shape {list(found.shape)}"
                raise ConfigError(
                    field="HF",
                    value=str(self.folder),
                    rule=f"{has} {name}, which config.json asks for with shape {list(tensor.shape)}",
                    way_out="fetch the model's files again, or check config.json",
                )
        more = sorted(stored.keys() - wanted.keys() - {OUTPUT_NAME})
        require(
            not more,
            field="HF",
            value=str(self.folder),
            rule=f"has {len(more)} tensors that config.json does not ask for, {more[0] if more else ''} first",
            way_out="fetch the model's files again, or check config.json",
        )
        return {name: stored[name] for name in wanted}

    def _dtype(self, options: ConvertOptions) -> torch.dtype:
        if options.dtype is not None:
            return DTYPES[options.dtype]
        found = {each.dtype for each in self._stored.values()}
        require(
            len(found) == 1 and found <= set(DTYPES.values()),
            field="HF",
            value=str(self.folder),
            rule=f"has weights in {', '.join(sorted(map(str, found)))}, and a checkpoint has them in one precision, "
            "float32 or bfloat16",
            way_out="choose one with --dtype",
        )
        return found.pop()


def _begin(folder: WholeFolder, num_bytes: int) -> None:
    with told(folder.partial, "cannot be made"):
        folder.begin(num_bytes)
        (folder.partial / ACTOR_FOLDER).mkdir()


def _write_files(
    model: _HfWeights, folder: Path, options: ConvertOptions
) -> tuple[dict[str, FileRecord], list[TensorPlace]]:
    """Every rank writes a share of the files, whose number does not depend on the ranks."""
    files = cut_into_files(model.sizes, options.max_file_bytes)

    def write() -> list[tuple[str, FileRecord, list[TensorPlace]]]:
        mine = []
        for number in my_share([sum(model.sizes[place] for place in places) for places in files]):
            links = [model.links[place] for place in files[number]]
            with told(folder, "cannot be written"):
                mine.append((tensor_file_name(number), *write_tensor_file(folder, number, model.read(links))))
            logger.info("wrote %s", mine[-1][0])
        return mine

    mine = on_every_rank(write)
    told_by_all = gather_json(
        [
            (name, dataclasses.astuple(record), [dataclasses.astuple(place) for place in places])
            for name, record, places in mine
        ]
    )
    every = sorted((each for rank in told_by_all for each in rank), key=lambda each: int(each[0].split("_")[2]))
    records = {name: FileRecord(*record) for name, record, _ in every}
    places = [TensorPlace(name, tuple(shape), *rest) for _, _, found in every for name, shape, *rest in found]
    return records, places


def _complete(model: _HfWeights, folder: Path, files: dict[str, FileRecord], places: Sequence[TensorPlace]) -> None:
    with told(folder, "cannot be completed"):
        write_tensor_index(folder / ACTOR_FOLDER, places)
        config = model_config_for(read_model_config(model.folder), str(model.dtype).removeprefix("torch."))
        write_model_files(folder / MODEL_FOLDER, model.folder, config)
        write_manifest(folder, 0, {}, {f"{ACTOR_FOLDER}/{name}": record for name, record in files.items()})


def _commit(folder: WholeFolder) -> None:
    with told(folder.partial, "cannot be completed"):
        folder.commit()
