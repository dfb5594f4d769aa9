"""Loads the model's tokenizer, and finds the tokens that end a response."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_fipo.config.base import ConfigError, require

_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face model folder, from its files alone and without running its code.

    Args:
        folder: The model folder.
        vocab_size: Rows of the model's embedding. More than the tokenizer uses is usual: vocabularies are
            padded.

    Raises:
        ConfigError: The folder has no tokenizer that can be read, or one whose ids the model does not have.
    """
    require(
        folder.is_dir(),
        field="model.path",
        value=folder,
        rule="must be a Hugging Face model folder, and there is no such folder",
        way_out="download or create the model there, or correct the path",
    )
    fetch = "fetch the model's tokenizer files again"
    # Without these files, some tokenizer classes load as an empty vocabulary.
    require(
        any((folder / name).is_file() for name in _VOCABULARY_FILES),
        field="model.path",
        value=folder,
        rule="must hold the model's tokenizer files, and has neither tokenizer.json nor another vocabulary",
        way_out=fetch,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # The tokenizers library raises plain exceptions.
    except Exception as error:
        rule = f"must hold a tokenizer that transformers can read ({type(error).__name__}: {error})"
        raise ConfigError("model.path", folder, rule, fetch) from error
    largest = _largest_id(tokenizer)
    require(
        largest < vocab_size,
        field="model.path",
        value=folder,
        rule=f"the tokenizer's ids reach {largest}, and the model's vocabulary has {vocab_size} tokens",
        way_out="put the model's own tokenizer into the folder, or resize the model's embeddings",
    )
    return tokenizer


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, configured: Sequence[int] = ()) -> tuple[int, ...]:
    """Collect the tokens that end a response.

    Chat models often name their end-of-turn token in only one of the places, so all of them count.

    Args:
        folder: The model folder.
        tokenizer: Its tokenizer.
        configured: rollout.stop_token_ids.

    Returns:
        The end-of-sequence tokens of generation_config.json, of config.json, and of the tokenizer, then the
        configured ones, each once.

    Raises:
        ConfigError: There is none at all, one of them is not a token, or a file cannot be read.
    """
    largest = _largest_id(tokenizer)
    places = {
        "model.path": [
            *_end_of_sequence(folder, "generation_config.json"),
            *_end_of_sequence(folder, "config.json"),
            *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
        ],
        "rollout.stop_token_ids": list(configured),
    }
    for field, ids in places.items():
        for token_id in ids:
            require(
                type(token_id) is int and 0 <= token_id <= largest,
                field=field,
                value=folder if field == "model.path" else token_id,
                rule=f"the stop token {token_id} is not one of the tokenizer's, whose ids reach {largest}",
                way_out="correct the id, or fetch the model's own tokenizer",
            )
    found = tuple(dict.fromkeys(token_id for ids in places.values() for token_id in ids))
    require(
        bool(found),
        field="rollout.stop_token_ids",
        value="()",
        rule="must name a token that ends a response, because the model's files and its tokenizer name none",
        way_out="give the id of the model's end-of-sequence or end-of-turn token",
    )
    return found


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values())


def _end_of_sequence(folder: Path, name: str) -> list[Any]:
    path = folder / name
    if not path.is_file():
        return []
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            field="model.path",
            value=folder,
            rule=f"must hold a readable {name} ({error})",
            way_out="fetch the model's files again",
        ) from error
    if named is None:
        return []
    return named if isinstance(named, list) else [named]
