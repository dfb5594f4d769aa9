"""What one pass over a source finds out about its rows."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_fipo.data.content_key import KEY_BYTES
from megatron_fipo.data.problem import SKIP_REASONS, SkipReason

SHOWN_ROWS = 5

_USABLE = 0
_NO_ROW = 255
_NO_KEY = bytes(KEY_BYTES)


@dataclass(slots=True)
class SkippedRows:
    """Rows of a source that were left out for the same reason.

    Attributes:
        count: How many.
        first_rows: Numbers of the first few.
        detail: What is wrong with the first.
    """

    count: int = 0
    first_rows: list[int] = field(default_factory=list)
    detail: str = ""

    def add(self, row: int, detail: str) -> None:
        """Count one more row."""
        if not self.count:
            self.detail = detail
        if self.count < SHOWN_ROWS:
            self.first_rows.append(row)
        self.count += 1

    def describe(self, reason: str) -> str:
        """Count, first rows and what is wrong with the first, in words."""
        shown = ", ".join(str(row) for row in self.first_rows)
        more = ", ..." if self.count > len(self.first_rows) else ""
        noun = "row" if self.count == 1 else "rows"
        return f"{self.count:,} {reason} {noun} ({shown}{more}), the first with {self.detail}"


@dataclass(slots=True)
class RowScan:
    """The verdicts on consecutive rows, as they are collected; 17 bytes a row.

    Attributes:
        keys: `content_key` of every row, end to end; zeros where it is not usable.
        verdicts: A byte for every row: usable, the number of a reason, or no row at all (a blank line).
        skipped: The unusable rows by reason, with places from 0 for row numbers.
    """

    keys: bytearray = field(default_factory=bytearray)
    verdicts: bytearray = field(default_factory=bytearray)
    skipped: dict[SkipReason, SkippedRows] = field(default_factory=dict)

    def add_usable(self, key: bytes) -> None:
        """The next row can be used."""
        self.keys += key
        self.verdicts.append(_USABLE)

    def add_unusable(self, reason: SkipReason, detail: str) -> None:
        """The next row is skipped."""
        self.skipped.setdefault(reason, SkippedRows()).add(len(self.verdicts), detail)
        self.keys += _NO_KEY
        self.verdicts.append(1 + SKIP_REASONS.index(reason))

    def add_blank(self) -> None:
        """The next line is blank: no row, though it has a number."""
        self.keys += _NO_KEY
        self.verdicts.append(_NO_ROW)

    def extend(self, other: "RowScan") -> None:
        """Append the verdicts on the rows that follow these."""
        shift = len(self.verdicts)
        self.keys += other.keys
        self.verdicts += other.verdicts
        for reason, rows in other.skipped.items():
            mine = self.skipped.setdefault(reason, SkippedRows(detail=rows.detail))
            mine.first_rows = [*mine.first_rows, *(row + shift for row in rows.first_rows)][:SHOWN_ROWS]
            mine.count += rows.count


class RowIndex:
    """The verdict and the content key of every row of a source, in memory: 17 bytes a row.

    Attributes:
        keys: [N, 2] uint64, the rows' content keys.
        first_number: Number of the first row in reports and prompt ids.
        skipped: The rows left out, by reason.
    """

    def __init__(self, scan: RowScan, first_number: int) -> None:
        self.keys = np.frombuffer(scan.keys, dtype="<u8").reshape(-1, KEY_BYTES // 8)
        self.first_number = first_number
        self.skipped = scan.skipped
        for rows in self.skipped.values():
            rows.first_rows = [row + first_number for row in rows.first_rows]
        self._verdicts = np.frombuffer(scan.verdicts, dtype=np.uint8)

    @property
    def num_rows(self) -> int:
        """Rows of the source, blank lines not counted."""
        return int((self._verdicts != _NO_ROW).sum())

    @property
    def usable(self) -> npt.NDArray[np.int64]:
        """[U] int64: places of the usable rows, from 0."""
        return np.flatnonzero(self._verdicts == _USABLE)

    def skip(self, places: npt.NDArray[np.int64], reason: SkipReason, detail: str) -> None:
        """Leave out rows that were usable.

        Args:
            places: [S] int64, ascending.
            reason: What they count as.
            detail: What is wrong with the first.
        """
        if len(places):
            self._verdicts[places] = 1 + SKIP_REASONS.index(reason)
            rows = (places[:SHOWN_ROWS] + self.first_number).tolist()
            self.skipped[reason] = SkippedRows(len(places), rows, detail)
