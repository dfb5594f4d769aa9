"""A prompt's metadata as plain Python values, on its way to a grading process."""

import math
from typing import Any


def as_literal(value: Any) -> Any:
    """Make plain Python values of a prompt's metadata, so that `repr` writes a literal.

    JSON would turn tuples into lists and the numbers that name a graph's nodes into text, and a task's scorer looks for
    what its generator made. A number that is not finite, as a table has in an empty cell, becomes None.

    Raises:
        TypeError: There is something else in it than text, numbers, None, lists, tuples, sets and mappings.
    """
    if isinstance(value, dict):
        return {as_literal(key): as_literal(each) for key, each in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(as_literal(each) for each in value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    # Text of NumPy's is text; its numbers have `item`.
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "item"):
        return as_literal(value.item())
    raise TypeError(f"{type(value).__name__} in a prompt's metadata cannot be sent to a grading process")
