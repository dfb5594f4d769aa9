"""What a conversion may be told, and how it fails. Nothing heavy is imported, so that help is instant."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_fipo.runtime.errors import CheckpointError, RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        step: Which checkpoint of a run; None is the newest valid one.
        dtype: Precision to write; None keeps each tensor's own.
        max_file_bytes: Size that a file of weights may reach; a larger tensor has one of its own.
        verify: What is compared afterwards: every tensor's bytes and the logits, one of them, or nothing.
        check_hashes: Whether the checkpoint's files are compared with their hashes before they are read.
        memory_bytes: Host memory that models may take for the logits; None is most of what is free.
    """

    step: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    max_file_bytes: int = 5 * 1024**3
    verify: Literal["all", "bytes", "logits", "nothing"] = "all"
    check_hashes: bool = True
    memory_bytes: int | None = None


class ConversionError(RunError):
    """A conversion that came to nothing, or whose result differs from its source. It leaves no folder."""


@contextmanager
def told(path: Path, what: str) -> Iterator[None]:
    """Errors of the file system become a ConversionError that names the place.

    Args:
        path: The place, where the error does not name one.
        what: What does not come about, as "cannot be written".
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConversionError(
            f"{getattr(error, 'filename', None) or path}: {what} ({reason}); free some space or mend its permissions, "
            "or choose another folder"
        ) from error
