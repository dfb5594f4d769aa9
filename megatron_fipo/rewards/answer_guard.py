"""Keeps answers away from scorers that would run them as Python.

Some of reasoning-gym's scorers read an answer with `eval`, or with sympy's `parse_expr`, which evaluates it.
An answer is text that a model wrote: it could read standard input, end the process, or worse. Those scorers
get only answers that cannot call anything but mathematical functions; what is kept from them is wrong in any
case.
"""

import re

# `Integral` is left out on purpose: as an antiderivative, Integral(f(x), x) is the question, not an answer.
_FUNCTIONS = "Abs|a?(?:sin|cos|tan)h?|sec|csc|cot|exp|ln|log|sqrt"

_NOT_ARITHMETIC = re.compile(r"[^0-9\s+\-*/().]", re.ASCII)
_NOT_EXPRESSION = re.compile(
    r"[^\w\s+\-*/^(),.]"  # Quotes, brackets, colons, and whatever is not ASCII.
    r"|\.\s*[A-Za-z_]"  # A name looked up in something.
    r"|\)\s*\("  # A call of something computed.
    rf"|\b(?!(?:{_FUNCTIONS})\b)[A-Za-z_]\w*\s*\(",  # A call by name.
    re.ASCII,
)
_CALL = re.compile(r"[()]")

_FORBIDDEN = {
    "binary_matrix": _CALL,
    "countdown": _NOT_ARITHMETIC,
    "intermediate_integration": _NOT_EXPRESSION,
    "n_queens": _CALL,
    "polynomial_multiplication": _NOT_EXPRESSION,
    "puzzle24": _NOT_ARITHMETIC,
    "simple_integration": _NOT_EXPRESSION,
    "spiral_matrix": _CALL,
    "string_insertion": _CALL,
}

EVALUATING_TASKS = frozenset(_FORBIDDEN)
"""Names of the reasoning-gym tasks whose scorers evaluate answers."""


def may_be_scored(task: str, answer: str) -> bool:
    """Whether the task's scorer can be given this answer.

    Args:
        task: Name of a reasoning-gym task.
        answer: The answer.
    """
    forbidden = _FORBIDDEN.get(task)
    return forbidden is None or forbidden.search(answer) is None
