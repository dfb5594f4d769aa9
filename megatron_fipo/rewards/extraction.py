"""Finds the answer in a response."""

import re

MAX_SEARCHED_CHARACTERS = 10_000
"""An answer is looked for in this many characters at the end of a response."""

_ANSWER_LINE = re.compile(r"(?i)\banswer\s*:[*\s]*([^\n]+)")
_BOXED = "\\boxed{"
# Each open one is followed to the end of the text.
_MAX_BOXES = 20


def find_by_pattern(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """Find the answer, without outer white space.

    Args:
        text: The response.
        pattern: Its last match's first group is the answer, in the response's last 10,000 characters; None
            takes the whole response.

    Returns:
        The answer, or None where there is none.
    """
    if pattern is None:
        return text.strip()
    answer = None
    for match in pattern.finditer(text[-MAX_SEARCHED_CHARACTERS:]):
        answer = match.group(1)
    return None if answer is None else answer.strip()


def find_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} whose braces close, in the response's last 10,000 characters."""
    text = text[-MAX_SEARCHED_CHARACTERS:]
    end_of_search = len(text)
    for _ in range(_MAX_BOXES):
        start = text.rfind(_BOXED, 0, end_of_search)
        if start < 0:
            break
        end = _closing_brace(text, start + len(_BOXED))
        if end is not None:
            return text[start + len(_BOXED) : end].strip()
        end_of_search = start
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth, escaped = 1, False
    for place in range(start, len(text)):
        character = text[place]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return place
    return None


def find_answer_line(text: str) -> str | None:
    """What follows the last "Answer:" on its line, without bold marks and closing full stops."""
    found = _ANSWER_LINE.findall(text[-MAX_SEARCHED_CHARACTERS:])
    return found[-1].rstrip(" \t\r*.").strip() if found else None
