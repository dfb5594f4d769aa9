"""`megatron-fipo train --replay DUMP [--section.field value ...]`."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.config.base import require
from megatron_fipo.config.watchdog import WatchdogConfig
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.runtime.exit_codes import FAILED, INTERRUPTED, TERMINATED
from megatron_fipo.runtime.stop_request import StopRequest
from megatron_fipo.runtime.watchdog.whereabouts import Whereabouts
from megatron_fipo.trainer.ranks import RankWork, do_on_ranks
from megatron_fipo.trainer.replay import Replay, open_dump, replay
from megatron_fipo.trainer.replay_report import show_replay


def replay_dump(words: Sequence[str]) -> int:
    """Run an update again and show what came of it; returns the exit status, 1 where it differs.

    Args:
        words: The dump, then overrides of its configuration.

    Raises:
        ConfigError: The dump or an override cannot be used; raised on every rank.
    """
    require(
        bool(words) and not words[0].startswith("-"),
        field="--replay",
        value=words[0] if words else "",
        rule="must name a dump",
        way_out="give RUN/dumps/step_N; the configuration is the dump's",
    )
    dump, config = open_dump(Path(words[0]), words[1:])
    config.parallelism.check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    outcomes: list[Replay] = []

    def work(rank: int, where: Whereabouts, stop: StopRequest) -> None:
        outcomes.append(replay(dump, config))
        if rank == 0:
            show_replay(outcomes[0], config.model.path)
        # A launcher ends all ranks once one has ended with a status, and rank 0 is to show it all.
        gather_json(None)

    status = do_on_ranks(
        RankWork(
            do=work,
            name="the replay",
            folder=None,
            # Nothing tells of its progress.
            watchdog=WatchdogConfig(stall_after_s=0),
            stop_statuses={"SIGINT": INTERRUPTED, "SIGTERM": TERMINATED},
            way_on="the same command begins anew",
        )
    )
    return status or (0 if outcomes[0].is_same else FAILED)
