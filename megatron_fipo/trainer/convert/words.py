"""The words of `megatron-fipo convert`. Nothing heavy is imported, so that help and mistakes are told at once."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from megatron_fipo.config.base import require
from megatron_fipo.trainer.convert.options import ConvertOptions

_GIB = 1024**3
_DESCRIPTION = """\
Converts between checkpoints and Hugging Face folders, tensor by tensor: on one process, or on as many as torchrun or
srun starts, which share the work. What was written is compared with what it was made from, and a difference leaves no
folder behind. docs/conversion.md says what is compared, and how.
"""
# What the two folders of each direction are called.
_FOLDERS: Final = {
    "to-hf": ("RUN|CHECKPOINT", "OUT"),
    "to-megatron": ("HF", "OUT"),
    "verify": ("RUN|CHECKPOINT", "HF"),
}
_CHECKPOINT_HELP = "a run directory, or one of its checkpoints (RUN/checkpoints/step_N)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What the command is to do.

    Attributes:
        direction: Its first word.
        source: What is read, or compared.
        target: What is written, or compared with it.
        options: How.
    """

    direction: Literal["to-hf", "to-megatron", "verify"]
    source: Path
    target: Path
    options: ConvertOptions

    def word_for(self, path: Path) -> str:
        """The word of the command that stands for a path: the source, what lies in it, or else the target."""
        source, target = _FOLDERS[self.direction]
        return source if path.is_relative_to(self.source) else target


def parse(words: Sequence[str]) -> Conversion:
    """Read the words after `convert`.

    Raises:
        ConfigError: A number is out of range.
        SystemExit: They ask for help, or make no command; that was told.
    """
    values = vars(_parser().parse_args(words))
    direction, source, target = (values.pop(name) for name in ("direction", "source", "target"))
    for flag, name in (("--max-file-gib", "max_file_gib"), ("--memory-gib", "memory_gib")):
        size = values.pop(name, None)
        require(
            size is None or 0 < size < math.inf,
            field=flag,
            value=size,
            rule="must be a positive number",
            way_out="give a size in GiB, such as 5",
        )
        if size is not None:
            values[name.replace("gib", "bytes")] = int(size * _GIB)
    values["check_hashes"] = not values.pop("trust_checkpoint", False)
    return Conversion(direction=direction, source=source, target=target, options=ConvertOptions(**values))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-fipo convert", description=_DESCRIPTION)
    directions = parser.add_subparsers(dest="direction", required=True, metavar="to-hf|to-megatron|verify")
    _add_to_hf(directions.add_parser("to-hf", help="a checkpoint becomes a Hugging Face folder"))
    _add_to_megatron(directions.add_parser("to-megatron", help="a Hugging Face folder becomes a checkpoint"))
    _add_verify(directions.add_parser("verify", help="compare a checkpoint with a Hugging Face folder, write nothing"))
    return parser


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser, "to-hf", _CHECKPOINT_HELP, "the new folder")
    _add_reading(parser)
    _add_writing(parser)
    _add_verifying(parser, ["all", "bytes", "logits", "nothing"])


def _add_to_megatron(parser: argparse.ArgumentParser) -> None:
    help_texts = ("a Hugging Face model folder with safetensors", "the new checkpoint, which holds weights alone")
    _add_folders(parser, "to-megatron", *help_texts)
    _add_writing(parser)
    _add_verifying(parser, ["all", "bytes", "logits", "nothing"])


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser, "verify", _CHECKPOINT_HELP, "the Hugging Face folder")
    _add_reading(parser)
    _add_verifying(parser, ["all", "bytes", "logits"])


def _add_folders(parser: argparse.ArgumentParser, direction: str, *help_texts: str) -> None:
    for name, word, text in zip(("source", "target"), _FOLDERS[direction], help_texts, strict=True):
        parser.add_argument(name, metavar=word, type=Path, help=text)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="a run's checkpoint of this step (default: the newest)")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="do not compare the checkpoint's files with their hashes first"
    )


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="precision to write (default: as it is)")
    parser.add_argument(
        "--max-file-gib", type=float, default=5.0, metavar="X", help="size a file of weights may reach (default: 5)"
    )


def _add_verifying(parser: argparse.ArgumentParser, choices: Sequence[str]) -> None:
    parser.add_argument("--verify", choices=choices, default="all", help="what is compared (default: all)")
    parser.add_argument(
        "--memory-gib", type=float, metavar="X", help="memory that models may take (default: most of what is free)"
    )
