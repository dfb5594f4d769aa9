"""JSON files that outlive a crash: appended line by line, or replaced as a whole."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.runtime.files.whole_file import whole_file


def append_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Add one line for each object and wait until they are on disk; numbers that are not finite become null."""
    lines = [json.dumps(_finite(each), ensure_ascii=False, allow_nan=False) + "\n" for each in objects]
    # Half a surrogate pair, which a JSON file may hold, is written as the JSON escape it was.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Objects of a file up to its first line that is not whole, as a killed writer leaves one at the end.

    Returns:
        The objects, and the size in bytes of the file up to the end of each.
    """
    objects: list[dict[str, Any]] = []
    ends: list[int] = []
    end = 0
    with path.open("rb") as file:
        for line in file:
            if (content := parse_line(line)) is None:
                break
            end += len(line)
            objects.append(content)
            ends.append(end)
    return objects, ends


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is not whole."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leave some lines of a file alone in it, those after the first one that is not whole not among them."""
    objects, ends = read_whole_lines(path)
    kept = [wanted(each) for each in objects]
    size = path.stat().st_size
    if all(kept) and (ends[-1] if ends else 0) == size:
        return
    # Where it is a link, that stays one.
    with path.open("rb") as old, whole_file(path.resolve()) as new:
        for is_kept, start, end in zip(kept, [0, *ends], ends, strict=False):
            line = old.read(end - start)
            if is_kept:
                new.write(line)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all, also after a crash."""
    text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    with whole_file(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def _finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, which JSON does not know, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
