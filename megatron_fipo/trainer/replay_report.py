"""What is told of an update that was run again."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.display.plain_text import harmless
from megatron_fipo.rollout.samples import Decode
from megatron_fipo.trainer.generation import decoder
from megatron_fipo.trainer.replay import Number, Replay
from megatron_fipo.types import TrainBatch

_PIPE_COLUMNS = 140
_ALWAYS = ("loss", "gradient norm", "kept tokens", "denominator")
# Sequences that a row names before it counts the others.
_NAMED = 4


def show_replay(replay: Replay, model: Path) -> None:
    """Print all of it.

    Args:
        replay: The update, on rank 0.
        model: Its model folder; without a tokenizer there, tokens are shown as numbers.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    for line in _head(replay):
        # A dump from elsewhere may say anything.
        console.print(Text(harmless(line)))
    console.print(_packs(replay))
    console.print(_tokens(replay, _decoder(model)))
    console.print(_numbers(replay.numbers))
    if replay.bad_gradients:
        numbers = ", ".join(map(str, replay.bad_gradients))
        console.print(Text(f"the gradient of micro-batch {numbers} alone is not finite"))
    console.print(Text(_verdict(replay), style="bold"))


def _decoder(model: Path) -> Decode | None:
    try:
        return decoder(load_tokenizer(model, sys.maxsize))
    except ConfigError:
        return None


def _head(replay: Replay) -> Iterator[str]:
    dump = replay.dump
    yield f"{dump.path}: {dump.place}"
    yield f"{dump.fault.kind}: {dump.fault.text}" if dump.fault.kind else "kept because it was asked for"
    for change in replay.changes:
        yield f"differs: {change}"
    for name, before in dump.machine.items():
        if replay.machine.get(name) != before:
            yield f"differs: {name}: {before} → {replay.machine.get(name)}"
    if not replay.is_same_cut:
        yield "differs: process grid or packs; numbers are compared to rounding, decisions exactly"


def _verdict(replay: Replay) -> str:
    how = "bit by bit" if replay.is_same_cut else "as far as another process grid or other packs can be"
    if replay.is_same:
        return f"the same, {how}"
    tokens = sum(each.differing if replay.is_same_cut else each.decided_otherwise for each in replay.packs)
    numbers = sum(not each.is_same for each in replay.numbers)
    return f"NOT the same: {numbers} numbers of the update and {tokens} of its tokens differ"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title in ("token", "sequences", "number") else "right")
    return table


def _packs(replay: Replay) -> Table:
    table = _table(
        *("micro-batch", "rank", "tokens", "loss sum", "max |log-ratio|", "not finite", "dropped", "dual-clipped"),
        *("differing", "max difference", "sequences"),
    )
    for each in replay.packs:
        more = f" and {len(each.sequences) - _NAMED} more" if len(each.sequences) > _NAMED else ""
        counts = (each.non_finite, each.dropped, each.dual_clipped, each.differing)
        table.add_row(
            *(str(each.number), str(each.rank), str(each.tokens)),
            *(f"{each.numerator:.9g}", f"{each.log_ratio:.6g}"),
            *map(str, counts),
            f"{each.difference:.3g}",
            ", ".join(map(str, each.sequences[:_NAMED])) + more,
        )
    return table


def _tokens(replay: Replay, decode: Decode | None) -> Table:
    numbers = ("log_ratio", "old_log_probs", "future_kl", "influence_weights", "advantages")
    titles = ("log-ratio", "old log-prob", "Future-KL", "weight", "advantage")
    table = _table("sequence", "place", *titles, "decision", "token")
    assert replay.batch is not None, "rank 0 has the batch"
    for each in replay.tokens:
        place, text = _text(replay.batch, each["sequence"], each["position"], decode)
        decision = ["dual-clipped"] if each["dual_clipped"] else []
        decision += [] if each["kept"] else ["dropped"]
        table.add_row(
            *(str(each["sequence"]), str(place)),
            *(f"{each[name]:.6g}" for name in numbers),
            ", ".join(decision),
            Text(text),
        )
    return table


def _text(batch: TrainBatch, sequence: int, position: int, decode: Decode | None) -> tuple[int, str]:
    """Place in the response of the token that a position predicts, and its text."""
    place = position + 1 - int(batch.prompt_lengths[sequence])
    token_id = int(batch.token_ids[int(batch.sequence_starts[sequence]) + position + 1])
    return place, str(token_id) if decode is None else f"{token_id} {harmless(decode([token_id]))!r}"


def _numbers(numbers: Sequence[Number]) -> Table:
    """The loss and its like, and every other number that differs."""
    table = _table("number", "dump", "replay", "")
    for each in numbers:
        if each.name in _ALWAYS or not each.is_same:
            table.add_row(each.name, _shown(each.before), _shown(each.now), "" if each.is_same else "differs")
    return table


def _shown(value: Any) -> str:
    return "–" if value is None else repr(value)
