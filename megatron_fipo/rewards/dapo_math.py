"""The rules of DAPO's verifier (arXiv:2503.14476): the last "Answer:" line, normalised, equal to the reference.

The normalisation is Minerva's (arXiv:2206.14858, appendix), in the order of DAPO's published code, because each step
sees what the one before it left. docs/rewards.md lists where this differs.
"""

import re

from megatron_fipo.rewards.base import Response, Verdict, required_reference

SEARCHED_CHARACTERS = 300
"""The answer is looked for in this many characters at the end of a response."""

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_UNITS_BEFORE_LDOTS = "square ways integers dollars mph inches hours km units"
_UNITS = (
    "sue points feet minutes digits cents degrees cm gm pounds meters meals edges students childrentickets multiples"
)
_REMOVED = (
    *_UNITS_BEFORE_LDOTS.split(),
    "\\ldots",
    *_UNITS.split(),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}"),
    *("^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_UNWRAPPED = (
    # Of a text with formulas the first one is kept.
    (re.compile(r"(.*?)\$(.*?)\$(.*)"), r"$\2$"),
    *((re.compile(rf"\\{command}\{{(.*?)\}}"), r"\1") for command in ("text", "textbf", "overline")),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    # \frac12 and \sqrt2 are short for \frac{1}{2} and \sqrt{2}.
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def normalise(answer: str) -> str:
    """Bring an answer to the form in which DAPO compares it."""
    answer = answer.split("=")[-1]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for text in _REMOVED:
        answer = answer.replace(text, "")
    for pattern, replacement in _UNWRAPPED:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    return (without_commas if without_commas.isdigit() else answer).strip()


class DapoMath:
    """1 where the last "Answer:" line in the response's last 300 characters is the reference, normalised; else 0."""

    def read_reference(self, response: Response) -> None:
        """Refuse a prompt without a reference answer, as `Term.read_reference`."""
        required_reference(response)

    def grade(self, response: Response) -> Verdict:
        """Judge one response, as `Term.grade`."""
        found = _ANSWER.findall(response.text[-SEARCHED_CHARACTERS:])
        if not found:
            return Verdict(0.0)
        answer = normalise(found[-1])
        return Verdict(float(answer == normalise(required_reference(response))), answer)

    def same_answer(self, first: str, second: str) -> bool:
        """Whether both are the same, normalised."""
        return normalise(first) == normalise(second)
