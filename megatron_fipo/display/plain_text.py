"""Text that came from a model or a file, made safe and short for a terminal."""

import re
import unicodedata

from rich.cells import chop_cells

# Unicode categories that move the cursor, reorder or hide text: controls, formats, surrogates, separators.
_HARMFUL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SUSPECTS = re.compile(r"[^\x20-\x7e]")


def harmless(text: str, newline: str = "⏎") -> str:
    """The text on one line, with nothing that a terminal would obey.

    Args:
        text: Anything; escape sequences and half surrogate pairs included.
        newline: Stands for a line break; a tab becomes a space, other control characters a dot.
    """
    return _SUSPECTS.sub(lambda match: _shown(match[0], newline), text)


def _shown(character: str, newline: str) -> str:
    if character == "\n":
        return newline
    if character == "\t":
        return " "
    return "·" if unicodedata.category(character) in _HARMFUL else character


def fit(text: str, width: int, rows: int) -> list[str]:
    """At most so many rows of the text, harmless; where it is too long its end stays and its middle goes.

    Args:
        text: Anything.
        width: Cells of a row, at least 2.
        rows: At least 1.
    """
    room = width * rows
    # Nothing beyond this can be shown, and a response may have a hundred thousand characters.
    shortened = text if len(text) <= 3 * room else text[:room] + text[-room:]
    lines = chop_cells(harmless(shortened), width) or [""]
    if len(lines) <= rows:
        return lines
    if rows == 1:
        return [chop_cells(lines[0], width - 1)[0] + "…"]
    return [*lines[: rows - 1], "…" + chop_cells(lines[-2][-width // 2 :] + lines[-1], width - 1)[-1]]
