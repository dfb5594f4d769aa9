r"""Cheap looks at an answer before a parser sees it: what no right answer has, and a parser may hang on.

An answer that a screen keeps back is wrong. The limits are far above those of real answers: the longest of the MATH-500
problems has 159 characters. What passes may still be slow, and is then stopped by its time limit.
"""

import math
import re

MAX_ANSWER_CHARACTERS = 1_000
MAX_BRACKET_DEPTH = 20
MAX_DIGITS = 300
"""Digits of one number."""
MAX_EXPONENT = 10_000
"""Of a number written as an exponent, or of a power that stands in an exponent."""
MAX_FACTORIAL = 10_000
MAX_SEPARATORS = 100
"""Commas and semicolons."""

_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_POWER = r"(?:\^|\*\*)[\s({\[]*[-+]?\s*"
_EXPONENT = re.compile(rf"{_POWER}(\d+)")
_TOWER = re.compile(rf"{_POWER}(\d+)\s*{_POWER}(\d+)(\s*{_POWER}\d)?")
_FACTORIAL = re.compile(r"(\d+)[\s)}\]]*!")
_REPEATED_FACTORIAL = re.compile(r"![\s)}\]]*![\s)}\]]*!")
# Left as questions they would be worked out and found right.
_UNEVALUATED = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-zA-Z])|Integral|\\frac\s*\{\s*d\s*\}")


def is_screened(answer: str, reference: str) -> bool:
    """Whether the answer is wrong by its form alone.

    Args:
        answer: What the model wrote.
        reference: The right answer; what that has itself, such as an integral sign, an answer may have too.
    """
    return is_hostile(answer) or (_UNEVALUATED.search(answer) is not None and _UNEVALUATED.search(reference) is None)


def is_hostile(text: str) -> bool:
    """Whether the text goes beyond a limit of this module."""
    return (
        len(text) > MAX_ANSWER_CHARACTERS
        or not text.isprintable()
        and any(ord(each) < 32 and each not in "\n\t\r" or 0xD800 <= ord(each) < 0xE000 for each in text)
        or text.count(",") + text.count(";") > MAX_SEPARATORS
        or _bracket_depth(text) > MAX_BRACKET_DEPTH
        or _NUMBER.search(text) is not None
        or _has_large_power(text)
        or _has_large_factorial(text)
    )


def _bracket_depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _has_large_power(text: str) -> bool:
    if any(int(exponent) > MAX_EXPONENT for exponent in _EXPONENT.findall(text)):
        return True
    for match in _TOWER.finditer(text):
        base, exponent = int(match[1]), int(match[2])
        if match[3] or (base > 1 and exponent * math.log(base) > math.log(MAX_EXPONENT)):
            return True
    return False


def _has_large_factorial(text: str) -> bool:
    if _REPEATED_FACTORIAL.search(text):
        return True
    return any(int(number) > MAX_FACTORIAL for number in _FACTORIAL.findall(text))
