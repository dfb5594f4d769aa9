"""Weights by broadcast from the trainer's ranks into the servers' ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.device import compute_device
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.weight_sync.base import PushReport, buckets
from megatron_fipo.weight_sync.flat_buckets import fill_buffer, plan_buffer
from megatron_fipo.weight_sync.sender_group import BrokenGroupError, SenderGroup, Sending
from megatron_fipo.weight_sync.server_calls import ServerCalls
from megatron_fipo.weight_sync.update import WeightUpdate


class DistributedTransport:
    """Broadcasts buckets of weights, from one rank of each pipeline stage to all servers.

    The stages take turns in a fixed order, in making groups as in sending: a server does one thing at a time, and two
    senders that begin at once could each wait for the other's server. A stage gathers its next bucket while the one
    before is sent. Groups stay for the next version as long as the servers do.

    When a server fails in a transfer, its group is given up, made anew without it, and everything is sent again.

    Args:
        bridge: Translates the actor's parameters.
        model: Bare model chunks of this rank.
        context: This rank's place.
        config: Size of a bucket, deadlines.
        calls: Connections to the servers.
    """

    def __init__(
        self, bridge: HfBridge, model: list[Any], context: ParallelContext, config: WeightSyncConfig, calls: ServerCalls
    ) -> None:
        self.context, self.config, self.calls = context, config, calls
        self._export = bridge.stage_export(model, context)
        self._group: SenderGroup | None = None
        places = gather_json([context.pp_rank, self._export.is_sender])
        self._senders = [
            next(rank for rank, place in enumerate(places) if place == [stage, True])
            for stage in range(context.pp_size)
        ]

    def push(self, policy_version: int, servers: Sequence[ServerAddress]) -> PushReport:
        """Give every server the actor's current weights; collective over all ranks."""
        update = WeightUpdate(self.calls, servers, self.config)
        update.begin()
        num_bytes = 0
        while update.alive:
            lost, num_bytes = self._transfer(update.alive, update.failed)
            if not lost:
                break
            update.fail(lost)
        update.end()
        update.publish(policy_version)
        return PushReport(num_bytes=num_bytes, failed=update.failed)

    def close(self) -> None:
        """Leave this rank's group; the servers keep theirs until they end."""
        if self._group is not None:
            self._group.leave(reachable=())
            self._group = None

    def _transfer(self, servers: list[ServerAddress], failed: Mapping[str, str]) -> tuple[dict[str, str], int]:
        """Send everything once: the servers that failed, with reasons, and the bytes sent. The same on every rank."""
        for stage, sender in enumerate(self._senders):
            is_its_turn = self._export.is_sender and self.context.pp_rank == stage
            lost = self._regroup(servers, failed) if is_its_turn else {}
            if lost := broadcast_json(lost, src=sender):
                return lost, 0
        total = 0
        for stage, sender in enumerate(self._senders):
            outcome = self._send_stage() if self.context.pp_rank == stage else None
            lost, num_bytes = broadcast_json(outcome, src=sender)
            if lost:
                return lost, 0
            total += num_bytes
        return {}, total

    def _regroup(self, servers: list[ServerAddress], failed: Mapping[str, str]) -> dict[str, str]:
        """Make this rank's group one of just these servers; those of the one before leave that, unless they failed."""
        names = [server.name for server in servers]
        if self._group is not None and self._group.names == names:
            return {}
        if self._group is not None:
            self._group.leave(reachable=[name for name in self._group.names if name not in failed])
            self._group = None
        try:
            self._group = SenderGroup(servers, self.calls, self.config.timeout_s)
        except BrokenGroupError as error:
            return error.lost
        return {}

    def _send_stage(self) -> tuple[dict[str, str], int]:
        """Gather this stage's tensors and send them, where this rank is the sender."""
        stream = self._export.stream()
        sender = _BucketSender(self._group) if self._group is not None else None
        for bucket in buckets(stream, self.config.bucket_mib * 1024**2, policy_version=0):
            if sender is not None and bucket.tensors:
                sender.send(bucket.tensors)
        return sender.end() if sender is not None else ({}, 0)


class _BucketSender:
    """Sends one bucket while the next is gathered.

    After a failure it takes buckets and drops them: other ranks are in the gathers that make them.
    """

    def __init__(self, group: SenderGroup) -> None:
        self._group = group
        self._free, self._busy = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
        self._sending: Sending | None = None
        self._lost: dict[str, str] = {}
        self._num_bytes = 0

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Wait for the bucket before, and begin to send this one."""
        if self._lost:
            return
        places = plan_buffer(tensors)
        size = places[-1].end
        if self._free.numel() < size:
            self._free = torch.empty(size, dtype=torch.uint8, device=compute_device())
        buffer = self._free[:size]
        fill_buffer(buffer, places, tensors)
        self._finish()
        if not self._lost:
            self._sending = self._group.send(buffer, places)
            self._free, self._busy = self._busy, self._free
            self._num_bytes += size

    def end(self) -> tuple[dict[str, str], int]:
        """Wait for the last bucket: the servers that failed, and the bytes sent."""
        self._finish()
        return self._lost, self._num_bytes

    def _finish(self) -> None:
        if self._sending is None:
            return
        try:
            self._group.finish(self._sending)
        except BrokenGroupError as error:
            self._lost = error.lost
        self._sending = None
