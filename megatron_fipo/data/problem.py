"""What the readers of prompt sources hand on: problems, and rows that cannot be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Messages = list[dict[str, Any]]
"""A conversation: `role` and `content` of each turn."""

SkipReason = Literal["broken", "empty", "no_answer", "over_long"]
"""Why a row is skipped: cannot be read, no prompt, no reference answer, or too many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A prompt before it is turned into tokens.

    Attributes:
        row: Line of the file, from 1, or index of the generated problem, from 0.
        prompt: Text or conversation.
        answer: Reference answer; None where the task's own scorer knows it.
        metadata: What the source's own scorer needs.
    """

    row: int
    prompt: str | Messages
    answer: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is skipped.

    Attributes:
        row: As in `Problem`.
        reason: What it counts as.
        detail: What exactly is wrong, for the report.
    """

    row: int
    reason: SkipReason
    detail: str
