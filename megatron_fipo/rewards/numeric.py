r"""Compares numbers: 1,234.5, -3/4, \frac{3}{4}, 12.5%, 1e-3, $5."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_fipo.rewards.base import BadReferenceError, Response, Verdict, required_reference
from megatron_fipo.rewards.extraction import MAX_SEARCHED_CHARACTERS, find_answer_line, find_boxed, find_by_pattern
from megatron_fipo.rewards.screens import MAX_ANSWER_CHARACTERS

MAX_DIGITS = 100
"""Digits of one number before and after the point, each; a longer one is no number."""

# Few, or a long gap would be tried in every possible way.
_SPACE = r"\s{0,3}"
_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}}){{1,33}}|\d{{1,{MAX_DIGITS}}})"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{0,{MAX_DIGITS}}})?|\.\d{{1,{MAX_DIGITS}}})(?:[eE][-+]?\d{{1,3}})?"
_TEX_FRACTION = rf"\\[dt]?frac{_SPACE}\{{{_SPACE}([-+]?{_DECIMAL}){_SPACE}\}}{_SPACE}\{{{_SPACE}({_DECIMAL}){_SPACE}\}}"
_NUMBER = re.compile(
    # Not inside a word or another number; a minus after a number is a difference.
    rf"(?<![\w.,])(?P<sign>[-+]?){_SPACE}\\?\$?{_SPACE}(?:{_TEX_FRACTION}|({_DECIMAL})(?:{_SPACE}/{_SPACE}({_DECIMAL}))?)"
    rf"(?P<percent>{_SPACE}\\?%)?(?!\w|[.,]\d|{_SPACE}/)",
    re.ASCII,
)


def read_number(text: str) -> Fraction | None:
    """The number that a text is, without outer white space, $ signs and a closing full stop; None if it is none."""
    text = text.strip().removesuffix(".").strip()
    if len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text.strip("$").strip()
    match = _NUMBER.fullmatch(text)
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    above, below = (match[2], match[3]) if match[2] else (match[4], match[5])
    denominator = _decimal(below) if below else Fraction(1)
    if not denominator:
        return None
    value = _decimal(above) / denominator
    value = -value if match["sign"] == "-" else value
    return value / 100 if match["percent"] else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


@dataclass(frozen=True, slots=True)
class Numeric:
    """1 where the answer is a number near the reference answer, else 0.

    The answer is what the pattern finds; without one, the content of the last box, else of the last "Answer:" line,
    else the last number of the response.

    Attributes:
        answer_pattern: Where the answer stands.
        relative_tolerance: Largest difference, as a fraction of the reference answer's size.
        absolute_tolerance: Largest difference; the wider one counts.
    """

    answer_pattern: re.Pattern[str] | None
    relative_tolerance: float
    absolute_tolerance: float

    def read_reference(self, response: Response) -> None:
        """Refuse a reference answer that is no number, as `Term.read_reference`."""
        reference = required_reference(response)
        if read_number(reference) is None:
            raise BadReferenceError(f"the reference answer {reference[:80]!r} is no number")

    def grade(self, response: Response) -> Verdict:
        """Judge one response, as `Term.grade`."""
        answer = self._find(response.text)
        if answer is None or len(answer) > MAX_ANSWER_CHARACTERS:
            return Verdict(0.0)
        reference = read_number(required_reference(response))
        assert reference is not None, "read_reference refuses it"
        number = read_number(answer)
        return Verdict(float(number is not None and self._near(number, reference)), answer)

    def same_answer(self, first: str, second: str) -> bool:
        """Whether both are numbers near each other."""
        numbers = read_number(first[:MAX_ANSWER_CHARACTERS]), read_number(second[:MAX_ANSWER_CHARACTERS])
        return numbers[0] is not None and numbers[1] is not None and self._near(numbers[0], numbers[1])

    def _find(self, text: str) -> str | None:
        if self.answer_pattern is not None:
            return find_by_pattern(text, self.answer_pattern)
        for found in (find_boxed(text), find_answer_line(text)):
            if found is not None:
                return found
        numbers = list(_NUMBER.finditer(text[-MAX_SEARCHED_CHARACTERS:]))
        return numbers[-1][0].strip() if numbers else None

    def _near(self, number: Fraction, reference: Fraction) -> bool:
        tolerance = max(Fraction(self.relative_tolerance) * abs(reference), Fraction(self.absolute_tolerance))
        return abs(number - reference) <= tolerance
