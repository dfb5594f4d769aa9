"""Weights by handles to memory that trainer and servers share: CUDA IPC where they use the same GPUs.

What is handed over is SGLang's own format, made by SGLang's own code, which is imported with the first transport.
"""

import importlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.multiprocessing
from torch import Tensor

from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.platform.device import compute_device, uses_cuda
from megatron_fipo.rollout.engine import ServerAddress, WeightBucket
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.weight_sync.base import PushReport, buckets
from megatron_fipo.weight_sync.flat_buckets import FlatTensor, fill_buffer, plan_buffer
from megatron_fipo.weight_sync.server_calls import ServerCalls, failures
from megatron_fipo.weight_sync.update import WeightUpdate, on_rank


class TensorTransport:
    """Hands buckets of weights over in place, from trainer ranks to servers on the same nodes.

    Every rank has every bucket, on its own device. A server's rank gets a handle from the trainer's rank on its GPU;
    where there is none on that GPU, and on a CPU, from the first on its node.

    Args:
        bridge: Translates the actor's parameters.
        model: Bare model chunks of this rank.
        config: Size of a bucket, deadlines.
        calls: Connections to the servers.
    """

    def __init__(self, bridge: HfBridge, model: list[Any], config: WeightSyncConfig, calls: ServerCalls) -> None:
        self.bridge, self.model, self.config, self.calls = bridge, model, config, calls
        self._format = HandleFormat()
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def push(self, policy_version: int, servers: Sequence[ServerAddress]) -> PushReport:
        """Give every server the actor's current weights; collective over all ranks.

        Raises:
            RunError: No trainer rank runs on a server's node; raised on every rank.
        """
        givers = self._choose_givers(servers)
        update = WeightUpdate(self.calls, servers, self.config)
        update.begin()
        num_bytes = 0
        for bucket in buckets(self.bridge.export(self.model), self.config.bucket_mib * 1024**2, policy_version):
            num_bytes += self._hand_over(bucket, update, givers)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        update.end()
        update.publish(policy_version)
        return PushReport(num_bytes=num_bytes, failed=update.failed)

    def _choose_givers(self, servers: Sequence[ServerAddress]) -> dict[str, list[int]]:
        """Trainer rank that gives each server's ranks their handles, by the server's name."""
        first_gpus = on_rank(0, lambda: self._first_gpus(servers))
        near = gather_json([self._local_rank, [server.name for server in servers if _is_here(server.url)]])
        chosen: dict[str, list[int]] = {}
        for server in servers:
            ranks = {local_rank: rank for rank, (local_rank, names) in enumerate(near) if server.name in names}
            if not ranks:
                raise RunError(
                    f"weight_sync.transport = tensor: no trainer rank runs on the node of {server.url}; "
                    'use "distributed", or start the servers on the trainer\'s nodes'
                )
            wanted = range(first_gpus[server.name], first_gpus[server.name] + server.tensor_parallel_size)
            chosen[server.name] = [ranks.get(gpu, min(ranks.values())) for gpu in wanted]
        return chosen

    def _first_gpus(self, servers: Sequence[ServerAddress]) -> dict[str, int]:
        replies = self.calls.start_all(servers, lambda server: server.info(self.config.timeout_s))
        missing = failures(replies)
        # One that does not answer is left out when the update begins.
        return {name: 0 if name in missing else reply.result().first_gpu for name, reply in replies.items()}

    def _hand_over(self, bucket: WeightBucket, update: WeightUpdate, givers: dict[str, list[int]]) -> int:
        """Give a bucket to every server that is left; its bytes."""
        places = plan_buffer(bucket.tensors)
        size = places[-1].end
        rank = torch.distributed.get_rank()
        mine = [
            (server.name, place)
            for server in update.alive
            for place, giver in enumerate(givers[server.name])
            if giver == rank
        ]
        handles: list[tuple[str, int, str]] = []
        if mine:
            buffer = self._shared_buffer(size)
            fill_buffer(buffer, places, bucket.tensors)
            if buffer.is_cuda:
                torch.cuda.current_stream().synchronize()
            # A handle each: opening one twice would break the count of its users.
            handles = [(name, place, self._format.dump(buffer, places)) for name, place in mine]
        found = {(name, place): handle for each in gather_json(handles) for name, place, handle in each}
        update.ask_each(
            lambda address: (
                lambda server: server.update_weights_from_tensor(
                    [found[address.name, place] for place in range(address.tensor_parallel_size)],
                    self.config.timeout_s,
                    load_format="flattened_bucket",
                )
            )
        )
        return size

    def _shared_buffer(self, size: int) -> Tensor:
        """Memory that other processes can open, used again for every bucket."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=compute_device())
            if not self._buffer.is_cuda:
                self._buffer.share_memory_()
        return self._buffer[:size]


@dataclass(frozen=True, slots=True)
class HandleFormat:
    """Makes a handle of a buffer as SGLang reads it."""

    def __post_init__(self) -> None:
        if uses_cuda():
            # Devices by their identifiers, since processes may number them differently.
            importlib.import_module("sglang.srt.utils.patch_torch").monkey_patch_torch_reductions()
        else:
            # Descriptors of open files, the default, cannot be handed to a process of another program: it would end.
            # What PyTorch starts to look after such memory lives as long as the server, and keeps stderr open.
            torch.multiprocessing.set_sharing_strategy("file_system")

    def dump(self, buffer: Tensor, places: Sequence[FlatTensor]) -> str:
        """A handle of the buffer with the places of its tensors, in base64."""
        metadata = importlib.import_module("sglang.srt.weight_sync.tensor_bucket").FlattenedTensorMetadata
        serializer = importlib.import_module("sglang.srt.utils.common").MultiprocessingSerializer
        contents = [
            metadata(
                name=place.name,
                shape=torch.Size(place.shape),
                dtype=place.dtype,
                start_idx=place.start,
                end_idx=place.end,
                numel=place.end - place.start,
            )
            for place in places
        ]
        handle: str = serializer.serialize({"flattened_tensor": buffer, "metadata": contents}, output_str=True)
        return handle


def _is_here(url: str) -> bool:
    """Whether an address belongs to this machine; loopback does, so servers are there only where all ranks are here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((urlsplit(url).hostname, 0))
        except OSError:
            return False
    return True
