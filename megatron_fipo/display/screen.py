"""The live view's screen: what is known of a run, laid out for a terminal of any size."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from megatron_fipo.display.live_state import View
from megatron_fipo.display.plain_text import fit, harmless
from megatron_fipo.display.readings import READINGS, accuracy, duration, quantity, sparkline, speeds

_TITLE, _HEAD, _LABEL, _WARNING = "bold reverse", "bold cyan", "dim", "yellow"
_PHASES = {
    "rollout": "generation",
    "distribute": "distribution",
    "old_log_probs": "old log-probs",
    "update": "updates",
    "weight_sync": "weight sync",
}
_COLUMN_CELLS = 36
_MIN_SAMPLE_ROWS = 2
_MAX_LOG_ROWS = 6
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Screen:
    """A frame of the live view; fills the height it is given, or takes what it needs where there is none.

    Attributes:
        view: What is known.
        now: The view's clock.
    """

    view: View
    now: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = _lines(self, max(options.max_width, 20), options.height, options.ascii_only)
        for line in lines:
            line.no_wrap = True
            line.truncate(options.max_width, overflow="crop")
            if options.ascii_only:
                line.plain = line.plain.encode("ascii", "replace").decode()
            yield line


def recorded_svg(console: Console, title: str) -> str:
    """A picture of what a recording console has printed, in whatever monospaced font is at hand: it fetches none."""
    return _FONT_FACE.sub("", console.export_svg(title=title))


def _lines(screen: Screen, width: int, height: int | None, ascii_only: bool) -> list[Text]:
    """Every row; the sample and the log get what the rest leaves."""
    view = screen.view
    top = [_title(screen, width), *_bars(view, width, ascii_only), _clock(screen)]
    rows = 24 if height is None else height
    metrics = _metrics(view, width, ascii_only)
    room = max(rows - len(top) - _MIN_SAMPLE_ROWS - 4, 1)
    top += metrics[:room]
    left = rows - len(top)
    for_log = min(_MAX_LOG_ROWS, left // 3, len(view.lines) + 1)
    if view.response is not None and left - for_log > 1:
        top += _sample(view.response, width, left - for_log - 1)
    log_rows = min(rows - len(top) - 1, len(view.lines))
    if log_rows > 0:
        top += [_head("log", width), *_log(view.lines, width, log_rows)]
    return top if height is None else top[:height]


def _title(screen: Screen, width: int) -> Text:
    view = screen.view
    step = f"step {view.step}/{view.num_steps}" if view.step else "before step 1"
    right = f" {step}  {duration(screen.now - view.begun.get('run', screen.now))} "
    room = max(width - cell_len(right), 0)
    return Text(set_cell_size(" " + harmless(view.name), room) + right, style=_TITLE)


def _bars(view: View, width: int, ascii_only: bool) -> list[Text]:
    first = "evaluation" if "evaluation" in view.counts else "rollout"
    return [_bar(view, phase, width, ascii_only) for phase in (first, "update")]


def _bar(view: View, phase: str, width: int, ascii_only: bool) -> Text:
    done, total = view.counts.get(phase, (0, 0))
    label = f"{_PHASES.get(phase, phase):<11}"
    count = f" {done:>5}/{total:<5}" if total else f" {'–' if not ascii_only else '-':>5}      "
    room = max(width - len(label) - len(count) - 1, 1)
    filled = room * done // total if total else 0
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    return Text.assemble(
        (label, "bold" if view.phase == phase else ""),
        (full * filled, "green"),
        (empty * (room - filled), "dim"),
        count,
    )


def _clock(screen: Screen) -> Text:
    view, now = screen.view, screen.now
    doing = _PHASES.get(view.phase, view.phase.replace("_", " ")) or "between phases"
    if view.phase:
        doing += f" {duration(now - view.begun['phase'])}"
    left = f"left {duration(view.step_left(now))} (run {duration(view.run_left(now))})"
    return Text.assemble((doing, "bold green"), f"  {left}")


def _metrics(view: View, width: int, ascii_only: bool) -> list[Text]:
    """The last step's readings in columns, with the reward's history in front."""
    if not view.metrics and not view.evaluation:
        return []
    lines = [_head(f"after step {view.metrics.get('step', 0)}", width)]
    if view.rewards:
        history = sparkline(view.rewards, width - 16, ascii_only)
        lines.append(Text.assemble((f"{'reward':<8}", _LABEL), f"{view.rewards[-1]:.3f}  ", (history, "green")))
    entries = [(each.label, text) for each in READINGS[1:] if (text := each.show(view.metrics)) is not None]
    rates = speeds(view.metrics)
    entries += [(f"{_PHASES.get(name, name)} tok/s", quantity(value)) for name, value in rates.items()]
    lines += _columns(entries, width)
    shown = accuracy(view.evaluation)
    if shown is not None:
        lines.append(Text.assemble(("accuracy ", _LABEL), f"{shown}, after step {view.evaluation.get('step', 0)}"))
    times = [f"{_PHASES.get(name, name)} {seconds:.1f} s" for name, seconds in _times(view) if seconds >= 0.05]
    if times:
        lines.append(Text.assemble(("times    ", _LABEL), ", ".join(times)))
    return lines


def _times(view: View) -> list[tuple[str, float]]:
    """Phases of the last step, the longest first."""
    last = view.history[-1] if view.history else {}
    return sorted(((name, seconds) for name, seconds in last.items() if name), key=lambda item: -item[1])


def _columns(entries: Sequence[tuple[str, str]], width: int) -> list[Text]:
    number = max(width // _COLUMN_CELLS, 1)
    cells = width // number
    lines = []
    for first in range(0, len(entries), number):
        line = Text()
        for label, value in entries[first : first + number]:
            gap = max(cells - 2 - cell_len(label) - cell_len(value), 1)
            line.append(label, _LABEL).append(" " * gap + value + "  ")
        lines.append(line)
    return lines


def _sample(response: tuple[str, str, float], width: int, rows: int) -> list[Text]:
    prompt, text, reward = response
    lines = [_head(f"response with reward {reward:.3f}", width)]
    if rows > 3:
        lines += [Text(line, style=_LABEL) for line in fit(prompt, width, 1 + rows // 4)]
    return lines + [Text(line) for line in fit(text, width, rows + 1 - len(lines))]


def _log(lines: Sequence[str], width: int, rows: int) -> list[Text]:
    shown = [fit(line, width, 1)[0] for line in list(lines)[-rows:]]
    return [Text(line, style="" if " INFO " in line else _WARNING) for line in shown]


def _head(title: str, width: int) -> Text:
    return Text(set_cell_size(f"{title} ".ljust(width, " "), width), style=_HEAD + " underline")
