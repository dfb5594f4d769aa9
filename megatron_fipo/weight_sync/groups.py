"""A process group of one sender and the ranks of its receivers, beside the sender's default group.

The ranks meet in the sender's key-value store, under the group's name. What a server's ranks do to join is in SGLang's
`init_custom_process_group`; `join_group` does the same, so that the keys agree.
"""

import socket
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world


def host_store(host: str, timeout: timedelta) -> TCPStore:
    """Begin a store that listens on `host` alone, at a free port; it ends when the object is dropped.

    By default PyTorch's store listens on every interface.
    """
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_group(
    address: tuple[str, int], name: str, rank: int, world_size: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Join a group; with gloo it returns once every rank has, with NCCL the first broadcast waits for them.

    Args:
        address: Host and port of the store.
        name: Name of the group, never used before in this process.
        rank: This process's rank in the group.
        world_size: Its number of ranks.
        backend: "gloo" or "nccl".
        timeout: How long joining, and then each collective, may take.
    """
    store = TCPStore(*address, is_master=False, timeout=timeout)
    # The types of its arguments differ between PyTorch's releases.
    make: Any = _new_process_group_helper
    group, _ = make(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    # Sources of collectives are given as global ranks, which this table translates.
    _world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    joined: dist.ProcessGroup = group
    return joined


def leave_group(group: dist.ProcessGroup) -> None:
    """Leave a group; a broadcast under way is ended with NCCL, and with gloo ends by its timeout."""
    group.abort()
    dist.destroy_process_group(group)


def address_towards(urls: list[str]) -> str:
    """The address of this machine that servers can reach: loopback only where all of them, and all ranks, are on it.

    Args:
        urls: The servers, one at least.
    """
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        # Connecting a datagram socket sends nothing; it has the system choose the interface.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))
            addresses.append(probe.getsockname()[0])
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])
