"""Checks a Hugging Face model folder before anything is built from it, and writes one."""

import copy
import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.safetensors_file import StoredTensor, TensorRecord, fault_of, record_of, stored_tensors
from megatron_fipo.runtime.files.whole_folder import WholeFolder

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# One matrix where embeddings are tied; some folders have it under both names then.
EMBEDDING_NAME = "model.embed_tokens.weight"
OUTPUT_NAME = "lm_head.weight"
# Weights in forms that are not read, which may lie beside those that are.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_FINGERPRINT_BYTES = 4096
# Files beside the weights that an export carries over unchanged.
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def read_model_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ConfigError: The folder or its config.json is missing or unreadable, or asks for code of its own to be run.
    """
    if not folder.is_dir():
        raise ConfigError(
            field="model.path",
            value=str(folder),
            rule="must be a Hugging Face model folder, and there is no such folder",
            way_out="download or create the model there, or correct the path",
        )
    path = folder / "config.json"
    rule = "must contain a readable config.json, and it is no JSON object"
    try:
        config = json.loads(path.read_text())
        if isinstance(config, dict):
            _refuse_code(folder, config)
            return config
    except FileNotFoundError:
        rule = "must contain config.json, and it does not"
    except UnicodeDecodeError:
        rule = "must contain a readable config.json, and it is not text"
    except json.JSONDecodeError as error:
        rule = f"must contain a readable config.json, and it is not JSON (line {error.lineno}: {error.msg})"
    raise ConfigError(field="model.path", value=str(folder), rule=rule, way_out="fetch the model's files again")


def _refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose description names Python files of its own, as trust_remote_code would run them."""
    if config.get("auto_map"):
        raise ConfigError(
            field="model.path",
            value=str(folder),
            rule="asks for code of its own to be run (auto_map in config.json); trust_remote_code is off, and nothing "
            "of it was run",
            way_out="use a model whose architecture is part of transformers, with a config.json without auto_map",
        )


def model_config_for(
    source: dict[str, Any], dtype: str, context_length: int | None = None, rope_base: float | None = None
) -> dict[str, Any]:
    """Contents of config.json for the model in another precision, position range or rotary base.

    Args:
        source: The folder's config.json; left as it is.
        dtype: Precision, such as "bfloat16".
        context_length: Longest position; None keeps it.
        rope_base: Base of the rotary embedding; None keeps it.
    """
    config = copy.deepcopy(source)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if context_length is not None:
        config["max_position_embeddings"] = context_length
    if rope_base is not None:
        # transformers 5 reads rope_parameters; older readers know rope_theta alone.
        config["rope_theta"] = rope_base
        if isinstance(config.get("rope_parameters"), dict):
            config["rope_parameters"]["rope_theta"] = rope_base
    return config


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, tensor) pairs of all weight files, file by file; one tensor at a time is in memory."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def read_stored(folder: Path) -> dict[str, StoredTensor]:
    """Where every tensor of a folder lies, by its name.

    Raises:
        ConfigError: See `check_weights`.
    """
    check_weights(folder)
    return {each.name: each for path in weight_files(folder) for each in stored_tensors(path)}


def fault_of_tied_output(stored: Mapping[str, StoredTensor]) -> str:
    """In what an output matrix differs from the embedding that it is tied to; "" where it does not, or is absent.

    Args:
        stored: The tensors of a folder, from `read_stored`.
    """
    if OUTPUT_NAME not in stored or EMBEDDING_NAME not in stored:
        return ""
    return fault_of(stored[OUTPUT_NAME].record(), stored[EMBEDDING_NAME].record())


def fingerprint_folder(folder: Path) -> str:
    """Digest that tells model folders apart without reading all weights.

    Of weight files it covers the header and the two ends of every tensor's data, of other files everything. Training
    changes nearly every element of nearly every tensor, so two checkpoints differ there.
    """
    digest = hashlib.sha256()
    weights = weight_files(folder)
    others = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES)
    for path in (*weights, *others):
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start, stop in _sampled_ranges(file) if path in weights else [(0, path.stat().st_size)]:
                file.seek(start)
                digest.update(file.read(stop - start))
    return digest.hexdigest()


def _sampled_ranges(file: BinaryIO) -> list[tuple[int, int]]:
    """Bytes of a weight file that its fingerprint covers."""
    start = 8 + struct.unpack("<Q", file.read(8))[0]
    header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    ranges = [(0, start)]
    for entry in header.values():
        first, last = (start + offset for offset in entry["data_offsets"])
        ranges += [(first, min(first + _FINGERPRINT_BYTES, last)), (max(first, last - _FINGERPRINT_BYTES), last)]
    return ranges


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files."""
    return [folder / name for name in sorted(set(read_weight_map(folder).values()) or {SINGLE_NAME})]


def check_weights(folder: Path) -> dict[str, list[int]]:
    """Check that every weight file is there and whole, reading headers alone.

    Returns:
        Shape of every tensor by its name.

    Raises:
        ConfigError: There are no safetensors, a listed file is missing, or a file is shorter than its header says
            (a download that stopped half-way).
    """
    if (folder / INDEX_NAME).is_file():
        weight_map = read_weight_map(folder)
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).is_file():
        weight_map, names = {}, [SINGLE_NAME]
    else:
        raise _weights_error(folder, f"must contain {SINGLE_NAME} or {INDEX_NAME}, and it has neither")
    shapes: dict[str, list[int]] = {}
    for name in names:
        shapes.update(_check_file(folder, folder / name))
    absent = sorted(set(weight_map) - set(shapes))
    if absent:
        raise _weights_error(folder, f"lacks {len(absent)} tensors that its index lists, {absent[0]} first")
    return shapes


def read_weight_map(folder: Path) -> dict[str, str]:
    """Weight file of every tensor, as the folder's index has it; empty where there is no index.

    Raises:
        ConfigError: The index is damaged, or leads out of the folder.
    """
    if not (folder / INDEX_NAME).is_file():
        return {}
    try:
        weight_map = dict(json.loads((folder / INDEX_NAME).read_text())["weight_map"])
        outside = [name for name in weight_map.values() if Path(name).is_absolute() or ".." in Path(name).parts]
    except (ValueError, KeyError, TypeError) as error:
        rule = f"has a damaged {INDEX_NAME}: it is no JSON object with a weight_map"
        raise _weights_error(folder, rule) from error
    if outside:
        raise _weights_error(folder, f"has a {INDEX_NAME} that leads out of the folder, to {outside[0]}")
    return weight_map


def _check_file(folder: Path, path: Path) -> dict[str, list[int]]:
    if not path.is_file():
        raise _weights_error(folder, f"lacks the weight file {path.name} that its index lists")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + header_size > size:
            raise _weights_error(folder, f"has a cut-off weight file: {path.name} ends inside its header")
        try:
            header = json.loads(file.read(header_size))
        except ValueError as error:
            rule = f"has a damaged weight file: the header of {path.name} is not JSON"
            raise _weights_error(folder, rule) from error
    header.pop("__metadata__", None)
    needed = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < needed:
        raise _weights_error(folder, f"has a cut-off weight file: {path.name} is {size} of {needed} bytes")
    return {name: entry["shape"] for name, entry in header.items()}


def _weights_error(folder: Path, rule: str) -> ConfigError:
    return ConfigError(field="model.path", value=str(folder), rule=rule, way_out="fetch the model's weight files again")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is open to whom other new files are: the library's are for this user alone.

    Raises:
        OSError: It cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library tells the number in its text alone.
        found = re.search(r"os error ([0-9]+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)


class HfFolderWriter:
    """Writes a Hugging Face folder shard by shard beside its target, to be moved there once it is known to be good.

    Args:
        target: Folder to write; must not exist, or be empty.
        source: Folder that tokenizer and generation files come from.
        config: Contents of config.json.
        max_shard_bytes: Size a weight file may reach.
        remembers: Whether `check_bytes` is to be asked, for which every tensor is hashed as it is written.
    """

    def __init__(
        self,
        target: Path,
        source: Path,
        config: dict[str, Any],
        max_shard_bytes: int = 5 * 1024**3,
        *,
        remembers: bool = False,
    ) -> None:
        self.source, self.config = source, config
        self.max_shard_bytes = max_shard_bytes
        self.folder = WholeFolder(target, "export")
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._remembers = remembers
        self._records: dict[str, TensorRecord] = {}

    @property
    def partial(self) -> Path:
        """Where the folder is until `commit`."""
        return self.folder.partial

    def write(self, tensors: Iterable[tuple[str, Tensor]], num_bytes: int = 0) -> Path:
        """Write all tensors and the files beside them; an error leaves nothing behind.

        Args:
            tensors: Names and tensors.
            num_bytes: Space that has to be free before.

        Returns:
            The partial folder, whole but not yet in its place: see `commit`.

        Raises:
            ConfigError: The target is taken, or there is no room for it, see `WholeFolder`.
            OSError: The disk refuses.
        """
        self.folder.begin(num_bytes)
        try:
            self._write(tensors)
        except BaseException:
            self.folder.abandon()
            raise
        return self.partial

    def _write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if self._shard and self._shard_bytes + size > self.max_shard_bytes:
                self._flush()
            # A copy: the tensor may be a view of a buffer that the stream reuses.
            self._shard[name] = tensor.detach().cpu().clone().contiguous()
            self._shard_bytes += size
            if self._remembers:
                self._records[name] = record_of(self._shard[name], tensor.dtype)
        self._flush()
        self._finish()

    def check_bytes(self) -> list[str]:
        """What is wrong with the written folder: tensors that do not read back as they were given."""
        stored = read_stored(self.partial)
        faults = {name: fault_of(stored[name].record(), record) for name, record in self._records.items()}
        return [f"{name} has {fault}" for name, fault in faults.items() if fault]

    def _flush(self) -> None:
        save_tensors(self._shard, self.partial / f"shard-{len(self._shards):05d}.safetensors")
        self._shards.append(list(self._shard))
        self._total_bytes += self._shard_bytes
        self._shard, self._shard_bytes = {}, 0

    def _finish(self) -> None:
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.partial / f"shard-{number:05d}.safetensors").rename(self.partial / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.partial / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        (self.partial / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        for name in CARRIED:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, self.partial / name)
