"""Processes of a run are killed, it is started again, and it does what the uninterrupted run did, bit by bit."""

from pathlib import Path

import pytest

from tests.kill_campaign import EmbeddedRuns, pursue, wanted
from tests.killed_runs import Kill

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(7200)]

KILLS = (
    Kill(victim="rank 0", phase="update", occurrence=1),
    Kill(victim="rank 1", phase="rollout", occurrence=2),
    Kill(victim="writer", occurrence=1),
    Kill(victim="file", moment=0.6),
    Kill(victim="reward worker", phase="rollout", moment=0.1),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedRuns:
    return EmbeddedRuns(tmp_path_factory.mktemp("kills"))


def test_a_run_survives_the_death_of_any_of_its_processes(runs: EmbeddedRuns) -> None:
    lives = runs.live_through("killed", KILLS)
    assert [life.killed for life in lives] == [True] * len(KILLS)
    assert [life.left for life in lives] == [[]] * len(KILLS)


@pytest.mark.exhaustive
def test_a_campaign_of_random_kills(tmp_path: Path) -> None:
    count = wanted(0.68, 14)
    assert pursue(EmbeddedRuns(tmp_path, num_steps=8), "embedded", count) >= count
