"""One response as coloured text: how the policy, and with it each token's weight, moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from megatron_fipo.display.plain_text import harmless
from megatron_fipo.display.token_file import TokenRecords

# From weak to strong, readable on dark and light terminals and told apart by colour-blind readers.
_BELOW = ("black on #d1e5f0", "black on #92c5de", "black on #4393c3", "white on #2166ac")
_ABOVE = ("black on #fddbc7", "black on #f4a582", "black on #d6604d", "white on #b2182b")
_INVISIBLE = 0.05
_STRONGEST = 8


@dataclass(frozen=True, slots=True)
class TokenReading:
    """A number that every token has.

    Attributes:
        name: As `--show` names it.
        field: Of `TokenRecords`.
        title: What it is.
        centre: The value that changes nothing.
    """

    name: str
    field: str
    title: str
    centre: float


READINGS = (
    TokenReading("log_ratio", "log_ratio", "log-ratio  log π_θ − log π_old of the token itself", 0.0),
    TokenReading("future_kl", "future_kl", "Future-KL  F: the decayed sum of the log-ratios from here on", 0.0),
    TokenReading(
        "weight", "influence_weights", "influence weight  f: what the token's advantage is multiplied by", 1.0
    ),
)


@dataclass(frozen=True, slots=True)
class ResponseTokens:
    """The recorded tokens of one sample.

    Attributes:
        records: Of the whole step.
        number: Which of their samples.
    """

    records: TokenRecords
    number: int

    @property
    def tokens(self) -> slice:
        """Where they lie in the records."""
        return slice(int(self.records.starts[self.number]), int(self.records.starts[self.number + 1]))

    @property
    def is_dropped(self) -> bool:
        """Whether the loss left the sequence out."""
        return not bool(self.records.kept[self.tokens].any())

    def values(self, field: str) -> npt.NDArray[np.float32]:
        """A column of the records, [tokens]."""
        column: npt.NDArray[np.float32] = getattr(self.records, field)[self.tokens]
        return column

    def pieces(self) -> Sequence[str]:
        """Text of every token, or its id where the run had no tokenizer."""
        if self.records.pieces is None:
            return [f"‹{token_id}›" for token_id in self.records.token_ids[self.tokens]]
        return self.records.pieces[self.tokens]


def coloured_text(response: ResponseTokens, reading: TokenReading) -> Text:
    """The response, every token on the colour of its value; a line break is marked and breaks the line."""
    values = response.values(reading.field)
    scale = _scale(values, reading)
    text = Text()
    for piece, value in zip(response.pieces(), values.tolist(), strict=True):
        text.append(harmless(piece, newline="⏎\n"), _style(value - reading.centre, scale))
    return text


def legend(response: ResponseTokens, reading: TokenReading) -> Text:
    """What the colours mean: the values at which they begin."""
    values = response.values(reading.field)
    scale = _scale(values, reading)
    text = Text(f"{reading.title}\n")
    steps = len(_ABOVE)
    for place in [*range(-steps, 0), *range(1, steps + 1)]:
        # The value at which a colour begins, seen from the centre.
        edge, sign = (abs(place) - 1) / steps or _INVISIBLE, 1 if place > 0 else -1
        shown = f" {'≥' if place > 0 else '≤'}{reading.centre + sign * edge * scale:.4g} "
        text.append(shown, _style(sign * (edge + 1e-6), 1.0))
        if place == -1:
            text.append(f" {reading.centre:g} ")
    return text.append(f"\nin this response from {values.min():.4g} to {values.max():.4g}" if len(values) else "")


def strongest(response: ResponseTokens, reading: TokenReading) -> Text:
    """The tokens whose value lies farthest from what changes nothing, for readers without colours."""
    pieces, values, places = response.pieces(), response.values(reading.field), response.values("places")
    distance = np.abs(values - reading.centre)
    order = np.argsort(-distance, kind="stable")[:_STRONGEST]
    least = _INVISIBLE * _scale(values, reading)
    words = [
        f"{places[index]}:{harmless(pieces[index])!r} {values[index]:.4g}"
        for index in order
        if distance[index] >= least
    ]
    return Text("strongest  " + (", ".join(words) or "none"))


def numbers(response: ResponseTokens) -> Table:
    """All numbers of all tokens."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("place", justify="right")
    table.add_column("token")
    columns = {
        "old log-prob": "old_log_probs",
        "log-ratio": "log_ratio",
        "Future-KL": "future_kl",
        "weight": "influence_weights",
        "entropy": "entropy",
    }
    for title in columns:
        table.add_column(title, justify="right")
    values = [response.values(field) for field in columns.values()]
    for index, (place, piece) in enumerate(zip(response.values("places"), response.pieces(), strict=True)):
        table.add_row(str(place), Text(harmless(piece)), *(f"{column[index]:+.5f}" for column in values))
    return table


def _scale(values: npt.NDArray[np.float32], reading: TokenReading) -> float:
    finite = np.abs(values[np.isfinite(values)] - reading.centre)
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _style(distance: float, scale: float) -> str:
    strength = abs(distance) / scale
    # Also true of NaN.
    if not strength >= _INVISIBLE:
        return ""
    shades = _ABOVE if distance > 0 else _BELOW
    return shades[min(int(min(strength, 1.0) * len(shades)), len(shades) - 1)]
