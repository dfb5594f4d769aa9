"""Find the first seed of each model at which no decision lies near its threshold, and every rule is exercised.

Run `python -m tests.invariance.choose_seeds [model]` after a change of models, batch or algorithms, and write what it
finds into `updates.SEEDS`.
"""

import itertools
import sys
import tempfile
from pathlib import Path

from tests.distributed_helpers import run_distributed
from tests.invariance import updates
from tests.invariance.grid import ALGORITHMS, Combination
from tests.invariance.margins import run_watched


def faults_of(model: str, seed: int) -> list[str]:
    """What makes a seed unfit."""
    updates.SEEDS[model] = seed
    with tempfile.TemporaryDirectory() as folder:
        updates.write_model(Path(folder) / model, model, seed)
        runs = run_watched(Path(folder), [Combination(model=model, algorithm=algorithm) for algorithm in ALGORITHMS])
    return [
        f"{algorithm}: {fault}" for algorithm, (_, faults) in zip(ALGORITHMS, runs, strict=True) for fault in faults
    ]


if __name__ == "__main__":
    for name in sys.argv[1:] or updates.ARCHITECTURES:
        for number in itertools.count():
            (found,) = run_distributed(faults_of, 1, name, number)
            print(f"{name}, seed {number}: {len(found)} faults, {found[0]}" if found else f"{name}, seed {number}: fit")
            if not found:
                break
