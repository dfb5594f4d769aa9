"""Whether all ranks were started with one configuration: with several they part, or train on what none asked for."""

import json
import socket
from typing import Any

import torch.distributed as dist

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.load import plain_values
from megatron_fipo.config.run_changes import changes_between
from megatron_fipo.parallel.agreement import on_every_rank
from megatron_fipo.parallel.collectives import broadcast_json


def require_same_configuration(config: Any) -> None:
    """Compare with rank 0's configuration; collective over all ranks.

    Args:
        config: This rank's, of any command.

    Raises:
        ConfigError: A rank has another one; raised on every rank.
    """
    own = json.loads(json.dumps(plain_values(config)))
    of_rank_0 = broadcast_json(own, 0)

    def compare() -> None:
        for change in changes_between(of_rank_0, own):
            raise ConfigError(
                field=change.field,
                value=change.now,
                rule=f"rank {dist.get_rank()} ({socket.gethostname()}) was started with this, and rank 0 with "
                f"{change.before}",
                way_out="start every rank with the same file and the same words",
            )

    on_every_rank(compare)
