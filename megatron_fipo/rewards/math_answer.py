r"""Compares mathematical answers with math-verify. Importing this module imports sympy, which takes half a second.

math-verify parses LaTeX with a grammar and plain text made of digits and operators with sympy; neither runs a call that
the answer writes.
"""

import functools
import logging
import re
from dataclasses import dataclass
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_fipo.rewards.base import BadReferenceError, Response, Verdict, required_reference
from megatron_fipo.rewards.extraction import find_answer_line, find_boxed
from megatron_fipo.rewards.screens import is_hostile, is_screened

SEARCHED_FOR_EXPRESSION = 1_000
"""Without a box or an answer line, the last expression in this many characters at the end of the response counts."""

# Timeouts are switched off, since the caller has its own; math-verify would warn of that, and of every bad answer.
for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_INTEGER = re.compile(r"-?\d{1,15}", re.ASCII)
_PERCENT = re.compile(r"\s*\\?%$")
_MATH_DELIMITERS = re.compile(r"^(?:\$\$|\$|\\\(|\\\[)(.*?)(?:\$\$|\$|\\\)|\\\])$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class MathAnswer:
    r"""1 where math-verify finds the answer equal to the reference answer, else 0.

    Attributes:
        answer_from: "boxed" (the last \boxed{}), "answer_line" (the last "Answer:"), "last_expression", or "any", the
            first of them that there is.
    """

    answer_from: str

    def read_reference(self, response: Response) -> None:
        """Refuse a reference answer that math-verify cannot parse, as `Term.read_reference`."""
        reference = required_reference(response)
        if is_hostile(reference):
            raise BadReferenceError(f"the reference answer {reference[:80]!r} is beyond the limits of an answer")
        if not _expressions(reference):
            raise BadReferenceError(f"math-verify cannot parse the reference answer {reference[:80]!r}")

    def grade(self, response: Response) -> Verdict:
        """Judge one response, as `Term.grade`."""
        reference = required_reference(response)
        answer = self._find(response.text)
        if answer is None or is_screened(answer, reference):
            return Verdict(0.0, answer)
        return Verdict(float(_equal(reference, answer)), answer)

    def same_answer(self, first: str, second: str) -> bool:
        """Whether math-verify finds them equal with either of them as the reference."""
        if is_screened(first, second) or is_screened(second, first):
            return False
        return _equal(first, second) or _equal(second, first)

    def _find(self, text: str) -> str | None:
        if self.answer_from in ("any", "boxed") and (found := find_boxed(text)) is not None:
            return found
        if self.answer_from in ("any", "answer_line") and (found := find_answer_line(text)) is not None:
            return found
        return _last_expression(text) if self.answer_from in ("any", "last_expression") else None


@functools.lru_cache(maxsize=4096)
def _equal(reference: str, answer: str) -> bool:
    """Whether the answer equals the reference, which can be parsed; what is plain to see needs no parser."""
    if reference == answer:
        return True
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return int(reference) == int(answer)
    return bool(verify(list(_parsed(reference)), list(_parsed(answer)), timeout_seconds=None))


def _expressions(text: str) -> list[Any]:
    return [each for each in _parsed(text) if not isinstance(each, str)]


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify makes of an answer: expressions, and the text itself, which it compares as text.

    A percentage is read both as the number before the sign and as the number of hundredths.
    """
    found = _MATH_DELIMITERS.match(text)
    text = found[1] if found else text
    text = text.replace("**", "^")
    number = _PERCENT.sub("", text)
    parsed = parse(f"\\boxed{{{number}}}", _TARGETS, parsing_timeout=None)
    if number != text:
        parsed = [*parsed, *parse(f"\\boxed{{({number})/100}}", _TARGETS, parsing_timeout=None)[:1]]
    return tuple(parsed)


def _last_expression(text: str) -> str | None:
    """The text of the last formula, else of the last arithmetic expression or number."""
    end = text[-SEARCHED_FOR_EXPRESSION:]
    if is_hostile(end):
        return None
    parsed = parse(end, _TARGETS, parsing_timeout=None)
    return next((each for each in parsed if isinstance(each, str) and each), None)
