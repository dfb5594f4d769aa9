"""A checkpoint becomes a Hugging Face folder, tensor by tensor, and is in its place only once it is proven."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fipo.config.algorithm_card import CARD_FILE
from megatron_fipo.conversion.hf_folder import INDEX_NAME, SINGLE_NAME, model_config_for, read_model_config
from megatron_fipo.conversion.model_card import CARD_NAME, ModelCard
from megatron_fipo.conversion.model_files import carry_files, write_json_file
from megatron_fipo.conversion.safetensors_file import PlannedTensor, SafetensorsWriter, TensorRecord
from megatron_fipo.conversion.tensor_map import Link
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.runtime.files.whole_folder import WholeFolder
from megatron_fipo.trainer.convert.options import ConvertOptions, told
from megatron_fipo.trainer.convert.proof import prove
from megatron_fipo.trainer.convert.shares import cut_into_files, my_share
from megatron_fipo.trainer.convert.source import CheckpointSource, CheckpointWeights, open_checkpoint

logger = logging.getLogger(__name__)

Records = dict[str, TensorRecord]


@dataclasses.dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    links: Sequence[Link]
    tensors: Sequence[PlannedTensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def to_hf(path: Path, target: Path, options: ConvertOptions) -> None:
    """Write and prove the folder; collective over all ranks.

    Args:
        path: A run directory or a checkpoint.
        target: The folder to write.
        options: How.

    Raises:
        ConfigError: There is no such checkpoint, it is none that is converted, or the target is taken or too small.
        CheckpointError: The checkpoint is damaged.
        ConversionError: The folder cannot be written, or differs from the checkpoint. There is none then.
    """
    source = open_checkpoint(path, options)
    weights = on_every_rank(source.weights)
    shards = _plan(weights, options)
    folder = WholeFolder(target, "OUT")
    on_main_rank(lambda: _begin(folder, sum(shard.num_bytes for shard in shards)))
    try:
        records = _write_shards(weights, shards, folder.partial)
        on_main_rank(lambda: _write_beside(source, shards, folder.partial))
        proof = prove(source, weights, folder.partial, options, folder.partial, records)
        on_main_rank(lambda: _finish(source, shards, folder, proof))
    except BaseException:
        if dist.get_rank() == 0:
            folder.abandon()
        raise
    if dist.get_rank() == 0:
        logger.info("%s, step %d, is now %s", source.path, source.step, target)


def _begin(folder: WholeFolder, num_bytes: int) -> None:
    with told(folder.partial, "cannot be made"):
        folder.begin(num_bytes)


def _plan(weights: CheckpointWeights, options: ConvertOptions) -> list[_Shard]:
    wanted = None if options.dtype is None else DTYPES[options.dtype]
    tensors = [
        [PlannedTensor(each.name, each.shape, wanted or weights.dtype(link)) for each in link.hf]
        for link in weights.links
    ]
    files = cut_into_files([sum(each.num_bytes for each in group) for group in tensors], options.max_file_bytes)
    return [
        _Shard(
            SINGLE_NAME if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors",
            [weights.links[place] for place in places],
            [each for place in places for each in tensors[place]],
        )
        for number, places in enumerate(files, start=1)
    ]


def _write_shards(weights: CheckpointWeights, shards: Sequence[_Shard], folder: Path) -> Records:
    """Every rank writes a share of the shards; returns what all tensors are, before they went to the disk."""

    def write() -> Records:
        records: Records = {}
        for number in my_share([shard.num_bytes for shard in shards]):
            with (
                told(folder, "cannot be written"),
                SafetensorsWriter(folder / shards[number].name, shards[number].tensors) as file,
            ):
                for link in shards[number].links:
                    for tensor, part in zip(link.hf, link.split(weights.read(link)), strict=True):
                        records[tensor.name] = file.write(tensor.name, part)
            logger.info("wrote %s", shards[number].name)
        return records

    mine = on_every_rank(write)
    parts = gather_json({name: dataclasses.astuple(record) for name, record in mine.items()})
    return {
        name: TensorRecord(tuple(shape), dtype, sha256)
        for part in parts
        for name, (shape, dtype, sha256) in part.items()
    }


def _write_beside(source: CheckpointSource, shards: Sequence[_Shard], folder: Path) -> None:
    """All that is not weights, but for the card, which tells what the proof found."""
    with told(folder, "cannot be written"):
        if len(shards) > 1:
            weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
            total = sum(shard.num_bytes for shard in shards)
            write_json_file(
                folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            )
        config = model_config_for(read_model_config(source.model_folder), _dtype_name(shards))
        write_json_file(folder / "config.json", config)
        carry_files(source.model_folder, folder)
        if algorithm := source.algorithm():
            (folder / CARD_FILE).write_text(algorithm, encoding="utf-8")


def _finish(source: CheckpointSource, shards: Sequence[_Shard], folder: WholeFolder, proof: Sequence[str]) -> None:
    card = ModelCard(
        base_model=source.base_model(),
        step=source.step,
        dtype=_dtype_name(shards),
        algorithm=source.algorithm(),
        metrics=source.metrics(),
        proof=proof,
    )
    with told(folder.partial, "cannot be completed"):
        (folder.partial / CARD_NAME).write_text(card.text(), encoding="utf-8")
        folder.commit()


def _dtype_name(shards: Sequence[_Shard]) -> str:
    """The type that most weights have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
