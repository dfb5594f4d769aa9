"""What the layout suite and its mutants compare with: the same updates in one process, run once a session."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed_helpers import run_distributed
from tests.invariance.grid import ALGORITHMS, Combination
from tests.invariance.margins import run_watched
from tests.invariance.updates import ARCHITECTURES, Outcome, write_models


@dataclass(frozen=True)
class References:
    """Updates in one process.

    Attributes:
        root: Folder of the models.
        outcomes: By model and algorithm.
        faults: What makes them unfit to compare others with.
    """

    root: Path
    outcomes: dict[Combination, Outcome]
    faults: dict[Combination, list[str]]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    root = tmp_path_factory.mktemp("invariance")
    write_models(root)
    every = [Combination(model=model, algorithm=algorithm) for model in ARCHITECTURES for algorithm in ALGORITHMS]
    (runs,) = run_distributed(run_watched, 1, root, every)
    outcomes = {combination: outcome for combination, (outcome, _) in zip(every, runs, strict=True)}
    faults = {combination: found for combination, (_, found) in zip(every, runs, strict=True)}
    return References(root, outcomes, faults)
