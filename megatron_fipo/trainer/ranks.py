"""A command's work on every rank: the process group, the watchdog beside it, and what the process ends with."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.config.watchdog import WatchdogConfig
from megatron_fipo.parallel.flight_recorder import last_collectives, record_collectives
from megatron_fipo.platform.device import collective_backend, compute_device, uses_cuda
from megatron_fipo.rollout.servers.listener import job_address
from megatron_fipo.runtime.errors import BreakdownError, RunError
from megatron_fipo.runtime.exit_codes import BAD_INPUT, DONE, FAILED, GO_ON, INTERRUPTED
from megatron_fipo.runtime.logging import setup_logging
from megatron_fipo.runtime.stop_request import StopRequest, StopRequested
from megatron_fipo.runtime.watchdog.breakdowns import breakdown_statuses
from megatron_fipo.runtime.watchdog.watchdog import GOES_ON, Watchdog, WatchSettings
from megatron_fipo.runtime.watchdog.whereabouts import Whereabouts

# The watchdog comes first: it knows which rank is missing.
_TIMEOUT_OVER_WATCHDOG_S = 600.0
# Launchers start ranks together.
_START_PATIENCE = timedelta(minutes=30)
_MEETING_PATIENCE_S = 30.0
_LOOPBACK = "127.0.0.1"


class RanksApartError(Exception):
    """A rank has left the others' common order, which is a defect: nobody can wait for anybody any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """What a command does on every rank.

    Attributes:
        do: Does it; is told the rank, and gets what it tells of its progress to and where it looks for a stop.
        name: What it is called in messages.
        folder: Its directory; None where it has none that it could go on in.
        watchdog: When it is ended.
        longest_wait_s: How long one rank may do something by itself while the others are in a collective.
        stop_statuses: Exit status by the signal that ended it, where that is not `GO_ON`.
        way_on: What becomes of it after an early end, in messages.
    """

    do: Callable[[int, Whereabouts, StopRequest], None]
    name: str
    folder: Path | None
    watchdog: WatchdogConfig
    longest_wait_s: float = 1800.0
    stop_statuses: Mapping[str, int] = field(default_factory=lambda: {"SIGINT": INTERRUPTED})
    way_on: str = GOES_ON


def do_on_ranks(work: RankWork) -> int:
    """Do this rank's part; returns the exit status.

    Raises:
        ConfigError: This rank cannot join the others, or is the only one and met a bad input.
    """
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    where, stop = Whereabouts(), StopRequest()
    breakdown_status = (lambda: FAILED) if work.folder is None else breakdown_statuses(work.folder)
    watchdog = Watchdog(_settings(work, rank), where, stop, last_collectives, breakdown_status)
    timeout_s = max(work.longest_wait_s, work.watchdog.longest_s + _TIMEOUT_OVER_WATCHDOG_S)
    try:
        with watchdog, _process_group(watchdog, timedelta(seconds=timeout_s)):
            work.do(rank, where, stop)
    except BreakdownError as error:
        return _tell(rank, f"{work.name} stopped: {error}", breakdown_status())
    except RunError as error:
        return _tell(rank, f"{work.name} stopped: {error}", FAILED)
    except StopRequested as reason:
        return _tell(rank, f"{work.name} ended on {reason}; {work.way_on}", work.stop_statuses.get(str(reason), GO_ON))
    except ConfigError as error:
        if not watchdog.has_joined:
            raise
        return _tell(rank, str(error), BAD_INPUT)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        # At an ordinary end PyTorch would wait for the other ranks, or abort.
        os._exit(FAILED)
    return DONE


def _tell(rank: int, text: str, status: int) -> int:
    if rank == 0:
        print(f"megatron-fipo: {text}", file=sys.stderr)
    return status


def _settings(work: RankWork, rank: int) -> WatchSettings:
    return WatchSettings(
        rank=rank,
        speaks=rank == 1 or os.environ.get("LOCAL_RANK", "0") == "0",
        name=work.name,
        logs=(work.folder or Path()) / "logs",
        stop_within_s=work.watchdog.stop_within_s,
        stall_after_s=work.watchdog.stall_after_s,
        long_stall_after_s=work.watchdog.long_stall_after_s,
        stop_statuses=work.stop_statuses,
        way_on=work.way_on,
    )


@contextmanager
def _process_group(watchdog: Watchdog, timeout: timedelta) -> Iterator[None]:
    """Join the ranks that torchrun or srun started, or be the only rank."""
    if uses_cuda():
        check_visible_devices(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.cuda.set_device(compute_device())
    record_collectives()
    if "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=min(timeout, _START_PATIENCE)))
        store.set_timeout(timeout)
        if world_size > 1:
            _open_side_channel(dist.PrefixStore("side_channel", store), rank, watchdog)
        store = dist.PrefixStore("ranks", store)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(collective_backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield
    except (ConfigError, RunError, StopRequested) as end:
        # Raised on every rank. After any other error a rank stands alone, and leaving could wait for ever.
        if not _meet_before_leaving():
            raise RanksApartError(f"this rank ended, the others did not: {end}") from end
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _open_side_channel(store: dist.Store, rank: int, watchdog: Watchdog) -> None:
    if rank == 0:
        is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        store.set("address", json.dumps(watchdog.open(_LOOPBACK if is_one_node else job_address(os.environ))))
        return
    address = json.loads(store.get("address"))
    try:
        watchdog.join(address)
    except OSError as error:
        raise RunError(f"rank {rank} cannot reach rank 0 at {address['host']}:{address['port']}: {error}") from error


def check_visible_devices(num_devices: int, local_world_size: int) -> None:
    """Refuse ranks whose devices are hidden from them.

    Raises:
        ConfigError: There are more ranks on this node than devices that this one sees.
    """
    require(
        local_world_size <= num_devices,
        field="LOCAL_WORLD_SIZE",
        value=local_world_size,
        rule=f"each rank of a node uses the device of its number, and a rank sees only {num_devices}",
        way_out=(
            "start as many ranks on a node as it has devices, and let each see them all (Slurm: --gpus-per-node, not "
            "--gpus-per-task or --gpu-bind)"
        ),
    )


def _meet_before_leaving() -> bool:
    """Wait for the other ranks, which met the same error, and let no launcher end this one before it has told it.

    Launchers end all ranks once one has failed; that one need not be rank 0, which tells the error.

    Returns:
        Whether they came.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A rank that is gone cannot come.
    with suppress(RuntimeError):
        meeting = dist.all_reduce(torch.zeros(1), async_op=True)
        assert meeting is not None
        meeting.wait(timedelta(seconds=_MEETING_PATIENCE_S))
        return True
    return False
