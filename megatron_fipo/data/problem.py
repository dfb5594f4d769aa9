"""What the readers of prompt sources hand on: problems, and rows that cannot be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Messages = list[dict[str, Any]]
"""A conversation: `role` and `content` of each turn."""

SkipReason = Literal["broken", "empty", "no_answer", "duplicate", "too_short", "over_long"]
"""Why a row is skipped: it cannot be read, has no prompt, has no reference answer, repeats a prompt, or has too few or
too many tokens."""

SKIP_REASONS: tuple[SkipReason, ...] = get_args(SkipReason)


class UnusableRow(ValueError):
    """A row that is to be skipped.

    Attributes:
        reason: What it counts as.
        detail: What exactly is wrong, for the report.
    """

    def __init__(self, reason: SkipReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A prompt before it is turned into tokens.

    Attributes:
        prompt: Text or conversation.
        answer: Reference answer; None where the task's own scorer knows it.
        metadata: What the source's own scorer needs.
    """

    prompt: str | Messages
    answer: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
