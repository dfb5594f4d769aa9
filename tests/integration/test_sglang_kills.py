"""Runs that generate with a real SGLang server: ranks, controller and server are killed, and every group is used once.

A server that is given by its URL outlives them.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.rollout.sglang.client import SglangServer, open_session
from tests.kill_campaign import RANKS, ServedRuns, pursue, wanted
from tests.killed_runs import Kill
from tests.sglang_servers import RunningServer, needs_sglang

pytestmark = [pytest.mark.distributed, needs_sglang, pytest.mark.timeout(7200)]

MODES: dict[str, dict[str, Any]] = {
    "served": {},
    "asynchronous": {"policy_lag": 1, "partial_rollouts": True, "over_sampling": 1.5},
}


async def leave_an_update_open(server: RunningServer) -> None:
    async with open_session(server.api_key, 4) as session:
        await SglangServer(server.url, session).begin_weight_update()


def test_the_journal_gives_a_killed_run_its_batches_again(tmp_path: Path, sglang_server: RunningServer) -> None:
    runs = ServedRuns(tmp_path, sglang_server)
    # In the third step's update, whose batch is in the journal, and after the checkpoint of the second; then, in the
    # same step again, while the controller is asked for the fourth step's.
    kills = [
        Kill(victim="rank 1", phase="update", occurrence=3),
        Kill(victim="controller", phase="rollout", occurrence=2),
    ]
    # As a run that was killed in a weight sync leaves it.
    sglang_server.run(leave_an_update_open(sglang_server))
    lives = runs.live_through("killed", kills)
    assert [life.killed for life in lives] == [True, True, False]
    assert lives[-1].statuses == [0] * RANKS and not any(life.left for life in lives)
    assert 3 in runs.repeated


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", MODES)
def test_a_campaign_of_random_kills(mode: str, tmp_path: Path, sglang_server: RunningServer) -> None:
    count = wanted(0.15, 5)
    assert pursue(ServedRuns(tmp_path, sglang_server, num_steps=6, **MODES[mode]), mode, count) >= count


@pytest.mark.exhaustive
def test_a_campaign_of_random_kills_of_servers_too(tmp_path: Path) -> None:
    count = wanted(0.02, 1)
    assert pursue(ServedRuns(tmp_path, None, num_steps=6), "own server", count) >= count
