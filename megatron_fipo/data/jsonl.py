"""Problems from a JSONL file."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import JsonlPrompts
from megatron_fipo.data.problem import BadRow, Problem


def read_jsonl(source: JsonlPrompts, field: str) -> Iterator[Problem | BadRow]:
    """Read a file line by line; blank lines are passed over.

    Args:
        source: File and keys.
        field: Where the source lies in the configuration, such as data.train.

    Raises:
        ConfigError: The file cannot be opened.
    """
    try:
        file = source.path.open("rb")
    except OSError as error:
        raise ConfigError(
            field=f"{field}.path",
            value=source.path,
            rule=f"must be a readable file ({error.strerror})",
            way_out="correct the path",
        ) from error
    with file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                yield _read_line(row, line, source)


class _Number(str):
    """A JSON number as it is written, so that "1.50" stays that."""


def _read_line(row: int, line: bytes, source: JsonlPrompts) -> Problem | BadRow:
    try:
        # The mark that some editors put in front of a file is no part of the first line.
        content = json.loads(line.decode("utf-8-sig"), parse_int=_Number, parse_float=_Number)
    except UnicodeDecodeError as error:
        return BadRow(row, "broken", f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(row, "broken", f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow(row, "broken", "JSON nested too deep")
    if not isinstance(content, dict):
        return BadRow(row, "broken", "not a JSON object")
    prompt: Any = content.get(source.prompt_field)
    answer: Any = content.get(source.answer_field)
    bad = _check_prompt(row, prompt, source.prompt_field) or _check_answer(row, answer, source.answer_field)
    return bad or Problem(row=row, prompt=prompt, answer=str(answer))


def _check_prompt(row: int, prompt: Any, key: str) -> BadRow | None:
    if prompt is None or prompt == []:
        return BadRow(row, "empty", f'no "{key}"')
    if isinstance(prompt, list):
        for turn in prompt:
            texts = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
            if not all(_is_text(text) for text in texts):
                return BadRow(row, "broken", f'"{key}" has a message without a text role and content')
        if prompt[-1]["role"] == "assistant":
            return BadRow(row, "broken", f'"{key}" ends with the assistant\'s turn')
        prompt = prompt[-1]["content"]
    if not _is_text(prompt):
        return BadRow(row, "broken", f'"{key}" is neither text nor a list of messages')
    return None if prompt.strip() else BadRow(row, "empty", f'"{key}" is blank')


def _check_answer(row: int, answer: Any, key: str) -> BadRow | None:
    if answer is None:
        return BadRow(row, "no_answer", f'no "{key}"')
    if not isinstance(answer, str):
        return BadRow(row, "broken", f'"{key}" is neither text nor a number')
    return None if answer.strip() else BadRow(row, "no_answer", f'"{key}" is blank')


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, _Number)
