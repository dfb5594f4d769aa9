"""Tables of a campaign's report, for docs/benchmarks/reliability.md: `python -m tests.kill_report REPORT.jsonl`."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.integration.small_runs import read_lines

# These die at one of their file operations or bytes, whatever the phase.
_BY_THEMSELVES = ("file", "writer")


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: runs and kills by mode, kills by victim, kills by phase."""
    lines = ["| runs | seeds | lives | kills |", "|---|---|---:|---:|"]
    for mode, own in _by(runs, "mode").items():
        lives = [life for run in own for life in run["lives"]]
        seeds = [run["seed"] for run in own]
        lines.append(f"| {mode} | {min(seeds)}–{max(seeds)} | {len(lives)} | {_hits(lives)} |")
    killed = [life for run in runs for life in run["lives"] if life["killed"]]
    lines += ["", "| who | kills | end of the others after it, median and longest | statuses of the others |"]
    lines += ["|---|---:|---|---|"]
    for victim, own in sorted(_by(killed, "kill", "victim").items()):
        seconds = [life["seconds_to_end"] for life in own]
        statuses = Counter(status for life in own for status in life["statuses"] if status >= 0)
        told = ", ".join(f"{status} ({count})" for status, count in sorted(statuses.items()))
        # Nobody looks at the clock when they die.
        took = "not measured" if victim in _BY_THEMSELVES else f"{median(seconds):.1f} s, {max(seconds):.1f} s"
        lines.append(f"| {victim} | {len(own)} | {took} | {told} |")
    phases = Counter(life["kill"]["phase"] for life in killed if life["kill"]["victim"] not in _BY_THEMSELVES)
    lines += ["", "| phase | kills |", "|---|---:|", *(f"| {phase} | {n} |" for phase, n in phases.most_common())]
    return "\n".join(lines)


def _by(items: Iterable[dict[str, Any]], *keys: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        value: Any = item
        for key in keys:
            value = value[key]
        found[value].append(item)
    return found


def _hits(lives: Iterable[dict[str, Any]]) -> int:
    return sum(life["killed"] for life in lives)


if __name__ == "__main__":
    print(tables(read_lines(Path(sys.argv[1]))))
