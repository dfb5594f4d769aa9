"""The checkpoint that a conversion reads: found, checked, and seen tensor by tensor."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PretrainedConfig

from megatron_fipo.config.algorithm_card import CARD_FILE
from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.conversion.model_files import MODEL_FOLDER, read_architecture, read_origin
from megatron_fipo.conversion.tensor_map import Link, tensor_map
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.platform.checkpoint_reader import INDEX_FILE, CheckpointReader, read_index
from megatron_fipo.runtime.checkpoint_store import (
    MANIFEST_FILE,
    Checkpoint,
    CheckpointStore,
    check_bytes,
    read_checkpoint,
)
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.json_files import read_whole_lines
from megatron_fipo.trainer.checkpointing import ACTOR_FOLDER
from megatron_fipo.trainer.convert.options import ConvertOptions

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# As the command's words call it.
_NAMED = "RUN|CHECKPOINT"
# What a checkpoint has beside a model's weights.
_NOT_WEIGHTS = ("optimizer.state.", "random_states")


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint that is read.

    Attributes:
        path: Its folder.
        step: Finished steps.
    """

    path: Path
    step: int

    @property
    def model_folder(self) -> Path:
        """The folder that describes the model."""
        return self.path / MODEL_FOLDER

    @property
    def run(self) -> Path | None:
        """The run directory that it lies in."""
        in_run = self.path.resolve().parent.name == CHECKPOINTS
        return self.path.resolve().parent.parent if in_run else None

    def weights(self) -> "CheckpointWeights":
        """Its weights.

        Raises:
            CheckpointError: Its index is damaged, or of another model than it describes.
            ConfigError: It has no weights, or the model is none that is converted.
        """
        return CheckpointWeights(self.path / ACTOR_FOLDER, self.architecture())

    def architecture(self) -> PretrainedConfig:
        """The model, as transformers reads its description.

        Raises:
            CheckpointError: It has none.
            ConfigError: It has no weights, asks for code of its own, or transformers does not know it.
        """
        require(
            (self.path / ACTOR_FOLDER / INDEX_FILE).exists(),
            field=_NAMED,
            value=self.path,
            rule="has no weights, as no checkpoint of a rollout_only run has",
            way_out="name a run that trains",
        )
        if not self.model_folder.is_dir():
            raise CheckpointError(
                f"{self.model_folder}: is missing; a checkpoint that can be converted holds config.json and the "
                "tokenizer there"
            )
        return read_architecture(self.model_folder)

    def base_model(self) -> str:
        """Name of the model that was trained; empty where it is not known."""
        return read_origin(self.model_folder)

    def algorithm(self) -> str:
        """The effective-algorithm card; empty where there is none."""
        places = [self.path, *([self.run] if self.run else [])]
        found = next((place / CARD_FILE for place in places if (place / CARD_FILE).is_file()), None)
        return "" if found is None else found.read_text(encoding="utf-8")

    def metrics(self) -> list[Mapping[str, Any]]:
        """Lines of the run's metrics.jsonl up to the checkpoint's step."""
        path = None if self.run is None else self.run / "metrics.jsonl"
        if path is None or not path.is_file():
            return []
        return [line for line in read_whole_lines(path)[0] if line.get("step", self.step + 1) <= self.step]


class CheckpointWeights:
    """The weights of a checkpoint by the links that they are converted by; tensors are read one at a time.

    Args:
        folder: The actor's folder.
        architecture: The model.

    Raises:
        CheckpointError: The index is damaged, or of another model.
        ConfigError: The model is none that is converted.
    """

    def __init__(self, folder: Path, architecture: PretrainedConfig) -> None:
        self.links = tensor_map(architecture)
        index = read_index(folder)
        self._reader = CheckpointReader(folder, index)
        told = {name: each for name, each in index.state_dict_metadata.items() if not name.startswith(_NOT_WEIGHTS)}
        self._told: dict[str, TensorStorageMetadata] = {}
        self._names: dict[str, str] = {}
        for link in self.links:
            name = next((name for name in link.names if name in told), link.name)
            found = told.pop(name, None)
            if not isinstance(found, TensorStorageMetadata):
                raise CheckpointError(f"{folder} is of another model than it describes: it has no {link.name}")
            self._check(folder, link, tuple(found.size))
            self._told[link.name], self._names[link.name] = found, name
        if told:
            raise CheckpointError(
                f"{folder} is of another model than it describes: it has {len(told)} more tensors, {next(iter(told))} "
                "first"
            )

    @staticmethod
    def _check(folder: Path, link: Link, found: tuple[int, ...]) -> None:
        fits = found[1:] == link.shape[1:] and (
            found[:1] >= link.shape[:1] if link.may_be_padded else found[:1] == link.shape[:1]
        )
        if not fits:
            raise CheckpointError(
                f"{folder} is of another model than it describes: {link.name} has shape {found}, not {link.shape}"
            )

    def name_of(self, link: Link) -> str:
        """What a link's tensor is called in this checkpoint."""
        return self._names[link.name]

    def dtype(self, link: Link) -> torch.dtype:
        """The type of a link's tensor."""
        return self._told[link.name].properties.dtype

    def read(self, link: Link) -> Tensor:
        """A link's tensor, padding included.

        Raises:
            CheckpointError: A file is damaged.
        """
        return self._reader.read_tensor(self._names[link.name])

    def read_by_name(self, name: str) -> Tensor:
        """A tensor by the checkpoint's own name of it.

        Raises:
            CheckpointError: A file is damaged.
        """
        return self._reader.read_tensor(name)


def open_checkpoint(path: Path, options: ConvertOptions) -> CheckpointSource:
    """Find and check the checkpoint; collective over all ranks, which share the reading of its files.

    Args:
        path: A run directory or a checkpoint.
        options: Which of a run's checkpoints, and whether every byte is looked at.

    Raises:
        ConfigError: There is none.
        CheckpointError: It is damaged, or a later release wrote it. Of a run without a step, the one before is taken
            then, as long as there is one.
    """
    before: int | None = None
    while True:
        found = on_main_rank(partial(_find_readable, path, options.step, before))
        place, step = broadcast_json(None if found is None else [str(found.path), found.manifest.step], 0)
        source = CheckpointSource(Path(place), step)
        problem = _damage(source) if options.check_hashes else ""
        if not problem:
            return source
        if options.step is not None or source.path == path:
            raise CheckpointError(problem)
        logger.warning("%s is damaged, and the one before is taken: %s", source.path, problem)
        before = step


def _find_readable(path: Path, step: int | None, before: int | None) -> Checkpoint:
    try:
        return _find(path, step, before)
    except OSError as error:
        raise ConfigError(
            field=_NAMED,
            value=path,
            rule=f"must be a place that this user may read, and {error.filename or path} is none ({error.strerror})",
            way_out="mend its permissions, or name a copy",
        ) from error


def _find(path: Path, step: int | None, before: int | None) -> Checkpoint:
    if (path / MANIFEST_FILE).is_file():
        checkpoint = read_checkpoint(path)
        require(
            step in (None, checkpoint.manifest.step),
            field="--step",
            value=step,
            rule=f"must be left out where a checkpoint is named, which is of step {checkpoint.manifest.step}",
            way_out="name the run directory instead, or leave --step out",
        )
        return checkpoint
    store = CheckpointStore(path / CHECKPOINTS)
    steps = store.steps()
    if not steps:
        raise ConfigError(
            field=_NAMED,
            value=path,
            rule=f"is neither a checkpoint ({MANIFEST_FILE}) nor a run directory with checkpoints",
            way_out="name a run's output_dir, or one of its checkpoints/step_N",
        )
    if step is None:
        newest = store.newest_valid(check_hashes=False, before=before)
        assert newest is not None, "there are some"
        return newest
    require(
        step in steps,
        field="--step",
        value=step,
        rule=f"must be one of {', '.join(map(str, steps))}: {path} has no other checkpoints",
        way_out="choose one of these, or leave --step out for the newest",
    )
    return store.read(step)


def _damage(source: CheckpointSource) -> str:
    """What is wrong with its bytes, of which every rank reads a share; collective."""

    def share() -> str:
        files = sorted(read_checkpoint(source.path).manifest.files.items(), key=lambda each: -each[1].size)
        try:
            check_bytes(source.path, dict(files[dist.get_rank() :: dist.get_world_size()]))
        except CheckpointError as error:
            return str(error)
        return ""

    return "; ".join(problem for problem in gather_json(on_every_rank(share)) if problem)
