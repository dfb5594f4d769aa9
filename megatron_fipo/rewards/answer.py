"""Finds the answer in a response."""

import re

MAX_SEARCHED_CHARACTERS = 10_000


def find_answer(response_text: str, pattern: re.Pattern[str] | None) -> str | None:
    """Find the answer, without outer white space.

    Args:
        response_text: The response.
        pattern: Its last match's first group is the answer, in the response's last 10,000 characters; None
            takes the whole response.

    Returns:
        The answer, or None where there is none.
    """
    if pattern is None:
        return response_text.strip()
    answer = None
    for match in pattern.finditer(response_text[-MAX_SEARCHED_CHARACTERS:]):
        answer = match.group(1)
    return None if answer is None else answer.strip()
