"""Results of combinations, kept in a file where there is one, and as a table."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import megatron_fipo
from tests.invariance.compare import Deviation
from tests.invariance.grid import ALGORITHMS, Combination

CACHE_VARIABLE = "MEGATRON_FIPO_LAYOUT_CACHE"
"""Environment variable: file that results are appended to, and that a stopped run goes on from."""
REPORT_VARIABLE = "MEGATRON_FIPO_LAYOUT_REPORT"
"""Environment variable: Markdown file that the table of results is written to."""


class Ledger:
    """Deviations by combination; those of other sources than today's are not read back.

    Args:
        path: JSON lines, or None to keep nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.sources = path, _sources()
        self.results: dict[str, Deviation] = {}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                if record.pop("sources") == self.sources:
                    name = record.pop("combination")
                    self.results[name] = Deviation(**record | {"differences": tuple(record["differences"])})

    @classmethod
    def from_environment(cls) -> "Ledger":
        path = os.environ.get(CACHE_VARIABLE)
        return cls(Path(path) if path else None)

    def add(self, combination: Combination, deviation: Deviation) -> None:
        self.results[str(combination)] = deviation
        if self.path is not None:
            record = {"combination": str(combination), "sources": self.sources, **dataclasses.asdict(deviation)}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _sources() -> str:
    """Short digest of the package's and the suite's code."""
    digest = hashlib.sha256()
    for folder in (Path(megatron_fipo.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_report(results: Mapping[Combination, Deviation]) -> None:
    """Write the table where the environment asks for it."""
    if path := os.environ.get(REPORT_VARIABLE):
        Path(path).write_text(markdown(results))


def markdown(results: Mapping[Combination, Deviation]) -> str:
    """Worst deviations of every layout: over its algorithms, and of its gradients under each of them."""
    rows: dict[tuple[str, str], dict[str, list[Deviation]]] = {}
    for combination, deviation in results.items():
        algorithms = rows.setdefault((combination.model, combination.layout), {})
        algorithms.setdefault(combination.algorithm, []).append(deviation)
    head = ["model", "layout", "loss", "gradient norm", "metrics", "weights", *(f"gradients, {a}" for a in ALGORITHMS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (model, layout), algorithms in rows.items():
        everything = [deviation for deviations in algorithms.values() for deviation in deviations]
        cells = [_worst(everything, name) for name in ("loss", "grad_norm", "metrics", "weights")]
        cells += [_worst(algorithms.get(algorithm, []), "gradients") for algorithm in ALGORITHMS]
        lines.append("| " + " | ".join([model, layout, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _worst(deviations: Iterable[Deviation], name: str) -> str:
    values = [getattr(deviation, name) for deviation in deviations]
    return f"{max(values):.1e}" if values else ""
