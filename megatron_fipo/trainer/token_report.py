"""Which responses are kept of a step, and their token records from the loss to a file."""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_fipo.actor.token_records import COLUMNS
from megatron_fipo.display.token_file import TokenRecords, save_tokens, token_path
from megatron_fipo.parallel.agreement import on_main_rank
from megatron_fipo.parallel.collectives import Arrays, broadcast_json
from megatron_fipo.rollout.sample_records import sampled_groups
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.disk_errors import disk_errors_told
from megatron_fipo.trainer.state import Run
from megatron_fipo.types import TrainBatch

_BROKEN = "\ufffd"


def choose_recorded(run: Run, batch: TrainBatch | None) -> None:
    """Have the tokens of the step's kept samples recorded; collective over all ranks.

    Args:
        run: This rank's view.
        batch: The whole batch on rank 0.
    """
    count = run.config.metrics.samples_per_step
    if run.actor.train_step is None or not count:
        return
    sequences: list[int] | None = None
    if batch is not None:
        _, firsts = np.unique(batch.group_ids, return_index=True)
        sequences = firsts[sampled_groups(len(firsts), count)].tolist()
    run.actor.train_step.recorder.begin(broadcast_json(sequences, 0))


def write_token_records(run: Run, step: int, batch: TrainBatch | None) -> None:
    """Write tokens/step_N.npz on rank 0, unless no update has seen a kept sample; collective over all ranks.

    Raises:
        RunError: It cannot be written, or the run directory is gone; raised on every rank.
    """
    if run.actor.train_step is None or not run.config.metrics.samples_per_step:
        return
    tokens = run.actor.train_step.recorder.collect()
    on_main_rank(lambda: _write(run, step, batch, tokens))


def _write(run: Run, step: int, batch: TrainBatch | None, tokens: Arrays | None) -> None:
    if tokens is None or batch is None or run.directory is None or not len(tokens["sequences"]):
        return
    run.directory.require_here()
    decode = None if run.rollout is None else run.rollout.decode
    path = token_path(run.directory.path, step)
    with disk_errors_told(path, "cannot be written", RunError):
        save_tokens(_records(tokens, batch, decode), path)


def _records(tokens: Arrays, batch: TrainBatch, decode: Callable[[Sequence[int]], str] | None) -> TokenRecords:
    sequences, starts = np.unique(tokens["sequences"], return_index=True)
    # A position predicts the token after it.
    places = tokens["positions"] + 1
    token_ids = batch.token_ids[batch.sequence_starts[tokens["sequences"]] + places]
    ends = [*starts[1:].tolist(), len(token_ids)]
    columns = {name: tokens["values"][:, number].astype(np.float32) for number, name in enumerate(COLUMNS)}
    kept = columns.pop("kept").astype(np.bool_)
    pieces: list[str] | None = None
    if decode is not None:
        pieces = []
        for start, end in zip(starts.tolist(), ends, strict=True):
            pieces += token_pieces(token_ids[start:end].tolist(), decode)
    return TokenRecords(
        sequences=sequences.astype(np.int32),
        updates=batch.mini_batch_ids[sequences] + np.int32(1),
        advantages=batch.advantages[sequences],
        starts=np.array([*starts.tolist(), len(token_ids)], dtype=np.int64),
        token_ids=token_ids,
        places=(places - batch.prompt_lengths[tokens["sequences"]]).astype(np.int32),
        kept=kept,
        pieces=pieces,
        **columns,
    )


def token_pieces(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Text of every token; joined they are the text, but for bytes that are no character.

    Tokens that only together make a character stand with the first of them, the others are empty.

    Args:
        token_ids: Tokens of one response.
        decode: Token ids to text.
    """
    known: dict[int, str] = {}
    for token_id in token_ids:
        if token_id not in known:
            known[token_id] = _piece(token_ids[0], token_id, decode)
    pieces = [known[token_id] for token_id in token_ids]
    start = 0
    while start < len(pieces):
        size = _character_size(token_ids, start, decode) if _BROKEN in pieces[start] else 1
        if size > 1:
            pieces[start : start + size] = [decode(token_ids[start : start + size]), *[""] * (size - 1)]
        start += size
    return pieces


def _character_size(token_ids: Sequence[int], start: int, decode: Callable[[Sequence[int]], str]) -> int:
    """Tokens that make a whole character from `start`, or 1 where none do; UTF-8 has up to four bytes."""
    sizes = range(2, min(4, len(token_ids) - start) + 1)
    return next((size for size in sizes if _BROKEN not in decode(token_ids[start : start + size])), 1)


def _piece(before: int, token_id: int, decode: Callable[[Sequence[int]], str]) -> str:
    """The token's text inside a text: some tokenizers drop a space in front of the first token."""
    start, both = decode([before]), decode([before, token_id])
    return both.removeprefix(start) if both.startswith(start) else decode([token_id])
