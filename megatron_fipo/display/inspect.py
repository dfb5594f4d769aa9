"""`megatron-fipo inspect`: a run's steps, samples and tokens in the terminal, read from its files alone."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_fipo.config.base import ConfigError
from megatron_fipo.display.plain_text import fit, harmless
from megatron_fipo.display.readings import READINGS, accuracy, number
from megatron_fipo.display.run_files import RunFiles
from megatron_fipo.display.token_view import READINGS as TOKEN_READINGS
from megatron_fipo.display.token_view import ResponseTokens, TokenReading, coloured_text, legend, numbers, strongest

_PIPE_COLUMNS = 120
_LISTED = ("reward", "length", "entropy", "loss", "grad norm", "clipped low/high", "influence")


def inspect(words: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        ConfigError: There is no such run, step or sample, or the token records are damaged.
    """
    arguments = _parser().parse_args(words)
    if arguments.sample is not None and arguments.step is None:
        raise ConfigError("--sample", arguments.sample, "samples are counted within a step", "give --step N as well")
    run = RunFiles(arguments.run)
    console = _console(arguments.no_color)
    if arguments.step is None:
        _show_steps(console, run)
    elif arguments.sample is None:
        _show_samples(console, run, arguments.step)
    else:
        shown = [each for each in TOKEN_READINGS if arguments.show in (each.name, "all")]
        show_response(console, run, arguments.step, arguments.sample, shown, arguments.table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-fipo inspect",
        description="Lists the steps of a run; with --step its samples; with --sample one of them, token by token.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, of a run that goes on or has ended")
    parser.add_argument("--step", type=int, metavar="N", help="a step of the run")
    parser.add_argument("--sample", type=int, metavar="I", help="one of the step's samples, counted from 0")
    choices = [*(each.name for each in TOKEN_READINGS), "all"]
    parser.add_argument("--show", choices=choices, default="weight", help="what the colours mean (default: weight)")
    parser.add_argument("--table", action="store_true", help="all numbers of every token as well")
    parser.add_argument("--no-color", action="store_true", help="plain text, as with NO_COLOR set or into a pipe")
    return parser


def _console(no_color: bool) -> Console:
    plain = no_color or bool(os.environ.get("NO_COLOR"))
    console = Console(color_system=None if plain else "auto", highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_COLUMNS
    return console


def _show_steps(console: Console, run: RunFiles) -> None:
    listed = [reading for reading in READINGS if reading.label in _LISTED]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("step", *(reading.label for reading in listed), "accuracy"):
        table.add_column(title, justify="left" if title == "accuracy" else "right")
    for step, metrics in run.steps.items():
        table.add_row(str(step), *(reading.show(metrics) or "" for reading in listed), accuracy(metrics) or "")
    console.print(Text(f"{run.path}: {max(run.steps, default=0)} steps so far"))
    console.print(table)
    for name, text in run.dumps.items():
        console.print(Text(f"dumps/{name}, {harmless(text)}"))


def _show_samples(console: Console, run: RunFiles, step: int) -> None:
    metrics = run.metrics(step)
    readings = [f"{each.label} {text}" for each in READINGS if (text := each.show(metrics)) is not None]
    console.print(Text(f"step {step}: " + ", ".join(readings)))
    samples, records = run.samples(step), run.tokens(step)
    recorded = set() if records is None else set(records.sequences.tolist())
    if not samples:
        console.print("no samples were kept of this step (metrics.samples_per_step)")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("sample", "reward", "tokens", "ended", "recorded"):
        table.add_column(title, justify="right")
    table.add_column("prompt … and response")
    room = max(console.width - 45, 20)
    for place, sample in enumerate(samples):
        shown = _ending(str(sample.get("prompt", "")), room // 3) + " → " + str(sample.get("response", ""))
        table.add_row(
            str(place),
            _number(sample, "reward", ".3f"),
            _number(sample, "response_tokens", ".0f"),
            str(sample.get("finish_reason", "")),
            "yes" if sample.get("sequence") in recorded else "no",
            Text(fit(shown, room, 1)[0], no_wrap=True),
        )
    console.print(table)


def show_response(
    console: Console, run: RunFiles, step: int, place: int, shown: Sequence[TokenReading], with_table: bool
) -> None:
    """Print one response with its readings.

    Args:
        console: Where to.
        run: The run.
        step: One of its steps.
        place: One of the step's samples, from 0.
        shown: What the colours mean, one after the other.
        with_table: All numbers as well.

    Raises:
        ConfigError: There is no such step or sample, or the token records are damaged.
    """
    run.metrics(step)
    samples = run.samples(step)
    if not 0 <= place < len(samples):
        written = f"0 to {len(samples) - 1}" if samples else "none"
        raise ConfigError("--sample", place, f"step {step} of {run.path} has no such sample", f"it has {written}")
    sample = samples[place]
    response = _recorded(run, step, sample)
    console.print(_head(step, place, sample))
    if response is None:
        console.print("not recorded token by token: no update has seen it\n")
        console.print(Text(harmless(str(sample.get("response", "")), newline="⏎\n")))
        return
    kept = "dropped from the loss" if response.is_dropped else "in the loss"
    advantage = response.records.advantages[response.number]
    console.print(
        f"update {response.records.updates[response.number]}, advantage {advantage:+.4f}, {kept}; "
        f"{len(response.pieces())} response tokens"
    )
    for reading in shown:
        console.print()
        console.print(legend(response, reading))
        console.print(coloured_text(response, reading))
        console.print(strongest(response, reading))
    if with_table:
        console.print()
        console.print(numbers(response))


def _recorded(run: RunFiles, step: int, sample: dict[str, Any]) -> ResponseTokens | None:
    records = run.tokens(step)
    places = [] if records is None else (records.sequences == sample.get("sequence", -1)).nonzero()[0].tolist()
    return ResponseTokens(records, places[0]) if records is not None and places else None


def _head(step: int, place: int, sample: dict[str, Any]) -> Text:
    parts = [f"step {step}, sample {place}"]
    parts += [f"prompt {harmless(str(sample['prompt_id']))}"] if "prompt_id" in sample else []
    parts += [f"reward {reward}"] if (reward := _number(sample, "reward", ".3f")) else []
    parts += [f"answer {harmless(str(sample['answer']))}"] if sample.get("answer") is not None else []
    text = Text(", ".join(parts), style="bold")
    if sample.get("prompt"):
        text.append("\n" + harmless(str(sample["prompt"]), newline="⏎\n"), "not bold dim")
    return text


def _number(sample: dict[str, Any], key: str, form: str) -> str:
    value = number(sample, key)
    return "" if value is None else format(value, form)


def _ending(text: str, cells: int) -> str:
    return text if len(text) <= cells else "…" + text[-cells:]
