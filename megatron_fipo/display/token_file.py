"""Token records of a step on disk: plain arrays, readable without PyTorch, complete or absent."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_fipo.runtime.files.array_files import ArrayFileError, read_arrays
from megatron_fipo.runtime.files.whole_file import whole_file

FORMAT_VERSION = 1
_FLOATS = ("old_log_probs", "log_ratio", "future_kl", "influence_weights", "entropy")
_TYPES: dict[str, npt.DTypeLike] = {
    "sequences": np.int32,
    "updates": np.int32,
    "advantages": np.float32,
    "starts": np.int64,
    "token_ids": np.int32,
    "places": np.int32,
    "kept": np.bool_,
    **dict.fromkeys(_FLOATS, np.float32),
}
_PER_TOKEN = ("token_ids", "places", "kept", *_FLOATS)


class TokenFileError(ValueError):
    """A file of token records that cannot be read; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecords:
    """Response tokens of S samples, n in all, in the update that each sample was trained in.

    Attributes:
        sequences: [S] int32 place of the sample in the step's rollout batch; `sequence` in samples.jsonl.
        updates: [S] int32 number of the update, from 1.
        advantages: [S] float32.
        starts: [S + 1] int64, where a sample's tokens begin in the arrays below, and the end.
        token_ids: [n] int32.
        places: [n] int32, which token of the response, from 0; tokens that do not count for the loss are missing.
        kept: [n] bool, false where the sequence was dropped.
        old_log_probs: [n] float32, before the step's first update.
        log_ratio: [n] float32, now minus then, before any clamp.
        future_kl: [n] float32; 0 without FIPO.
        influence_weights: [n] float32; 1 without FIPO.
        entropy: [n] float32, in nats.
        pieces: [n] text of every token, empty where a character spans several tokens and stands with the first; None
            where the run had no tokenizer.
    """

    sequences: npt.NDArray[np.int32]
    updates: npt.NDArray[np.int32]
    advantages: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    kept: npt.NDArray[np.bool_]
    old_log_probs: npt.NDArray[np.float32]
    log_ratio: npt.NDArray[np.float32]
    future_kl: npt.NDArray[np.float32]
    influence_weights: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    pieces: Sequence[str] | None


def token_path(run: Path, step: int) -> Path:
    """File of a step's token records."""
    return run / "tokens" / f"step_{step:06d}.npz"


def save_tokens(records: TokenRecords, path: Path) -> None:
    """Write the records; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(records, name) for name in _TYPES}
    with whole_file(path) as file:
        np.savez_compressed(
            file,
            format_version=np.int64(FORMAT_VERSION),
            pieces=np.frombuffer(json.dumps(records.pieces).encode(), dtype=np.uint8),
            **arrays,
        )


def load_tokens(path: Path) -> TokenRecords:
    """Read records; nothing is unpickled.

    Raises:
        TokenFileError: The file cannot be read, is damaged, of another format version, or its arrays disagree.
    """
    try:
        arrays = read_arrays(path)
    except (ArrayFileError, OSError) as error:
        raise TokenFileError(f"cannot be read as token records ({error})") from error
    version = arrays.get("format_version", np.int64(-1))
    if version.shape != () or int(version) != FORMAT_VERSION:
        raise TokenFileError(f"has another format than version {FORMAT_VERSION}, which this release reads")
    wrong = [
        name
        for name, dtype in _TYPES.items()
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].ndim != 1
    ]
    try:
        pieces = json.loads(arrays["pieces"].tobytes())
    except (KeyError, ValueError):
        wrong.append("pieces")
    if wrong:
        raise TokenFileError(f"lacks {', '.join(wrong)}, or has them in another form")
    records = TokenRecords(**{name: arrays[name] for name in _TYPES}, pieces=pieces)
    if not _agree(records):
        raise TokenFileError("holds arrays of lengths that do not fit together")
    return records


def _agree(records: TokenRecords) -> bool:
    count, starts = len(records.sequences), records.starts
    if {len(records.updates), len(records.advantages), len(starts) - 1} != {count}:
        return False
    tokens = {len(getattr(records, name)) for name in _PER_TOKEN}
    pieces = tokens if records.pieces is None else {len(records.pieces)}
    return tokens == pieces == {int(starts[-1])} and int(starts[0]) == 0 and bool((np.diff(starts) >= 0).all())
