"""The small files of a model: its description, tokenizer and templates, as checkpoints and exports carry them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.conversion.hf_folder import (
    CARRIED,
    EMBEDDING_NAME,
    OUTPUT_NAME,
    fault_of_tied_output,
    read_model_config,
    read_stored,
)

# The folder of a checkpoint that holds them.
MODEL_FOLDER = "model"
# Beside them, in a checkpoint alone: which model it was.
ORIGIN_FILE = "origin.json"
# How the hub's cache calls the folder of "organisation/model".
_CACHED = "models--"


def write_model_files(folder: Path, source: Path, config: Mapping[str, Any]) -> None:
    """Make a folder that describes a model whose weights are elsewhere.

    Args:
        folder: The folder; made here.
        source: Model folder that tokenizer and generation files come from.
        config: Contents of config.json.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True)
    write_json_file(folder / "config.json", config)
    carry_files(source, folder)
    write_json_file(folder / ORIGIN_FILE, {"name": model_name(source)})


def model_name(folder: Path) -> str:
    """What a model folder is called: as on the hub where it lies in the hub's cache, else as the folder is."""
    place = folder.resolve()
    cached = next((part for part in place.parts if part.startswith(_CACHED)), "")
    return "/".join(cached.removeprefix(_CACHED).split("--", 1)) if cached else place.name


def carry_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation and licence files as they are.

    Args:
        source: Model folder, or what `write_model_files` made.
        folder: An existing folder.
    """
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def read_origin(folder: Path) -> str:
    """Name of the model that one was trained from; empty where it is not known.

    Args:
        folder: What `write_model_files` made.
    """
    try:
        return str(json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_architecture(folder: Path) -> PretrainedConfig:
    """A model's description as transformers reads it.

    Args:
        folder: A folder with config.json.

    Raises:
        ConfigError: There is none, it asks for code of its own, or transformers does not know the architecture.
    """
    content = read_model_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Transformers and its checks of a description raise errors of many kinds.
    except Exception as error:
        raise ConfigError(
            field="model.path",
            value=str(folder),
            rule=f"describes no model that transformers knows ({content.get('model_type')!r}: {_first_line(error)})",
            way_out="choose a supported architecture, such as Qwen2, Qwen3, Qwen3-MoE or Llama",
        ) from error


def check_tied_output(folder: Path) -> None:
    """See that a tied output matrix which a folder has a second time is the embedding.

    Where it is another one, transformers computes with it, while a tied model here has the embedding alone.

    Args:
        folder: Model folder with weights.

    Raises:
        ConfigError: It is another one, or cannot be read; or see `read_architecture` and `check_weights`.
    """
    if not read_architecture(folder).tie_word_embeddings:
        return
    try:
        fault = fault_of_tied_output(read_stored(folder))
    except OSError as error:
        raise ConfigError(
            field="model.path",
            value=str(folder),
            rule=f"has weights that cannot be read ({error.filename or folder}: {error.strerror})",
            way_out="mend that, or fetch the model's files again",
        ) from error
    require(
        not fault,
        field="model.path",
        value=str(folder),
        rule=f"has {OUTPUT_NAME} with {fault}, though config.json ties it to {EMBEDDING_NAME} (tie_word_embeddings)",
        way_out="set tie_word_embeddings to false if both are meant, or else remove that tensor",
    )


def write_json_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as model folders have it, on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
