r"""Cheap looks at an answer before a parser sees it: what no right answer has, and a parser may hang on.

An answer that a screen keeps back is wrong. The limits are far above those of real answers: the longest of the MATH-500
problems has 159 characters. What passes may still be slow, and is then stopped by its time limit.
"""

import math
import re

MAX_ANSWER_CHARACTERS = 1_000
MAX_BRACKET_DEPTH = 10
MAX_DIGITS = 300
"""Digits of one number."""
MAX_EXPONENT = 10_000
"""Of a number written as an exponent, and of the product or power that exponents upon each other come to."""
MAX_TOWER = 3
"""Exponents upon each other, letters included."""
MAX_FACTORIAL = 10_000
"""Of a number before an exclamation mark, and of the upper number of a binomial."""
MAX_SEPARATORS = 100
"""Commas and semicolons."""

_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_POWER = r"(?:\^|\*\*)[\s({\[]*[-+]?\s*"
_EXPONENT = re.compile(rf"{_POWER}(\d+)")
_TOWER = re.compile(rf"{_POWER}(\d+)\s*{_POWER}(\d+)")
_HIGH_TOWER = re.compile(rf"(?:{_POWER}(?:\d+|[A-Za-z])\s*){{{MAX_TOWER + 1}}}")
_POWERS_OF_POWERS = re.compile(rf"(?:{_POWER}\d+[\s)}}\]]*){{2,}}")
_FACTORIAL = re.compile(r"(\d+)[\s)}\]]*!|binom\s*\{?\s*(\d+)")
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
    if _HIGH_TOWER.search(text) or any(int(exponent) > MAX_EXPONENT for exponent in _EXPONENT.findall(text)):
        return True
    if any(_log_power(int(base), int(exponent)) > _MAX_LOG for base, exponent in _TOWER.findall(text)):
        return True
    runs = (_EXPONENT.findall(match[0]) for match in _POWERS_OF_POWERS.finditer(text))
    return any(math.prod(map(int, run)) > MAX_EXPONENT for run in runs)


_MAX_LOG = math.log(MAX_EXPONENT)


def _log_power(base: int, exponent: int) -> float:
    return exponent * math.log(base) if base > 1 else 0.0


def _has_large_factorial(text: str) -> bool:
    if _REPEATED_FACTORIAL.search(text):
        return True
    return any(int(number or upper) > MAX_FACTORIAL for number, upper in _FACTORIAL.findall(text))
