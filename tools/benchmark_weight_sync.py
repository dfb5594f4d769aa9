"""Times weights on their way from one trainer rank to one server, beside bare transfers of as many bytes.

A random Qwen2 model is built; every side moves all of its weights once a round, and the sides take turns:

- bare broadcast: a buffer of a bucket's size, broadcast over gloo to another process as often as needed
- distributed: the transport, to a process that answers as a server and receives, but loads nothing
- file copy: one file of as many bytes, copied inside the folder
- disk, written: the transport's files, which nobody reads
- with --url also "server, …": each transport into a real server of the same model, its loading included, which must run
  on this machine from --model with --dtype

    python tools/benchmark_weight_sync.py [--mib 256] [--dtype float32] [--bucket-mib 64] [--rounds 5]
        [--model FOLDER] [--url http://127.0.0.1:30000 --api-key KEY]

The model is written to --model where that folder does not exist, for a server to be started from.
"""

import argparse
import asyncio
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
import torch.distributed as dist
from aiohttp import web
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.actor.model import build_model, build_provider, unwrap
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.context import build_parallel_context
from megatron_fipo.platform.device import DTYPES, collective_backend
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.weight_sync.base import WeightTransport
from megatron_fipo.weight_sync.disk import DiskTransport
from megatron_fipo.weight_sync.distributed import DistributedTransport
from megatron_fipo.weight_sync.groups import host_store, join_group, leave_group
from megatron_fipo.weight_sync.server_calls import ServerCalls
from megatron_fipo.weight_sync.tensor import TensorTransport

MIB = 1024**2
TIMEOUT_S = 600.0


class Receiver:
    """Answers as a server does, and receives what is broadcast without using it."""

    def __init__(self) -> None:
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.worker = ThreadPoolExecutor(1)

    async def run(self) -> None:
        """Print the port, and answer for ever."""
        app = web.Application(client_max_size=64 * MIB)
        app.router.add_post("/{call}", self.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    async def answer(self, request: web.Request) -> web.Response:
        """Do what SGLang does, as far as the network goes."""
        body = await request.json()
        action = getattr(self, request.match_info["call"], None)
        if action is not None:
            await asyncio.get_running_loop().run_in_executor(self.worker, action, body)
        return web.json_response({"success": True})

    def init_weights_update_group(self, body: dict[str, Any]) -> None:
        """Join."""
        address, name = (body["master_address"], body["master_port"]), body["group_name"]
        world = (body["rank_offset"], body["world_size"], body["backend"])
        self.groups[name] = join_group(address, name, *world, timedelta(seconds=TIMEOUT_S))

    def destroy_weights_update_group(self, body: dict[str, Any]) -> None:
        """Leave."""
        leave_group(self.groups.pop(body["group_name"]))

    def update_weights_from_distributed(self, body: dict[str, Any]) -> None:
        """Receive a bucket."""
        shapes = zip(body["shapes"], body["dtypes"], strict=True)
        self.receive(sum(torch.Size(shape).numel() * getattr(torch, dtype).itemsize for shape, dtype in shapes), body)

    def bare(self, body: dict[str, Any]) -> None:
        """Receive buffers of the sizes given."""
        for size in body["sizes"]:
            self.receive(size, body)

    def receive(self, size: int, body: dict[str, Any]) -> None:
        """Receive so many bytes."""
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(self.buffer[:size], group_src=0, group=self.groups[body["group_name"]])


def write_model(folder: Path, mib: int, dtype: str) -> None:
    """Write a random model of so many MiB or a little more."""
    hidden = 1024
    per_layer = 4 * hidden**2 * 3 // 4 + 3 * hidden * 4 * hidden
    size = DTYPES[dtype].itemsize
    layers = max(1, math.ceil((mib * MIB / size - 8192 * hidden) / per_layer))
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(DTYPES[dtype]).save_pretrained(folder)


def post(url: str, call: str, body: dict[str, Any]) -> None:
    """Ask the receiver for something."""
    request = urllib.request.Request(f"{url}/{call}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S):
        pass


class BareBroadcast:
    """A group with the receiver, and as many bytes as the weights have."""

    def __init__(self, url: str, num_bytes: int, bucket_bytes: int) -> None:
        self.url = url
        whole, rest = divmod(num_bytes, bucket_bytes)
        self.sizes = [bucket_bytes] * whole + [rest] * bool(rest)
        self.buffer = torch.zeros(bucket_bytes, dtype=torch.uint8)
        timeout = timedelta(seconds=TIMEOUT_S)
        self.store = host_store("127.0.0.1", timeout)
        address = ("127.0.0.1", int(self.store.port))
        self.threads = ThreadPoolExecutor(1)
        body = {"master_address": address[0], "master_port": address[1], "group_name": "bare", "backend": "gloo"}
        joined = self.threads.submit(post, url, "init_weights_update_group", body | {"rank_offset": 1, "world_size": 2})
        self.group = join_group(address, "bare", 0, 2, "gloo", timeout)
        joined.result()

    def __call__(self) -> None:
        """Broadcast them."""
        received = self.threads.submit(post, self.url, "bare", {"sizes": self.sizes, "group_name": "bare"})
        for size in self.sizes:
            dist.broadcast(self.buffer[:size], group_src=0, group=self.group)
        received.result()


def file_copy(folder: Path, num_bytes: int) -> Callable[[], None]:
    """What copies a file of so many bytes."""
    source = folder / "bytes"
    source.write_bytes(bytes(num_bytes))
    return lambda: shutil.copyfile(source, folder / "copy") and None


def pusher(transport: WeightTransport, servers: list[ServerAddress]) -> Callable[[], None]:
    """What sends the weights once."""
    version = iter(range(10**6))

    def push() -> None:
        failed = transport.push(next(version), servers).failed
        assert not failed, failed

    return push


def measure(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def build_sides(
    arguments: argparse.Namespace, receiver_url: str, scratch: Path, resources: ExitStack
) -> tuple[int, dict[str, Callable[[], None]]]:
    """The bytes of the weights, and what moves them."""
    grid = ParallelismConfig()
    context = build_parallel_context(grid, seed=0)
    bridge = HfBridge(arguments.model)
    provider = build_provider(bridge, ModelConfig(path=arguments.model, dtype=arguments.dtype), grid, context)
    model = unwrap(build_model(provider, bridge, grid, context))
    config = WeightSyncConfig(bucket_mib=arguments.bucket_mib, timeout_s=TIMEOUT_S)
    calls = resources.enter_context(closing(ServerCalls(arguments.api_key)))
    server = ServerAddress(name="receiver", url=receiver_url, tensor_parallel_size=1, policy_version=-1)
    num_bytes = sum(tensor.nbytes for _, tensor in bridge.export(model))

    def broadcast() -> DistributedTransport:
        return resources.enter_context(closing(DistributedTransport(bridge, model, context, config, calls)))

    sides: dict[str, Callable[[], None]] = {
        "bare broadcast": BareBroadcast(receiver_url, num_bytes, arguments.bucket_mib * MIB),
        "distributed": pusher(broadcast(), [server]),
        "file copy": file_copy(scratch, num_bytes),
        "disk, written": pusher(DiskTransport(bridge, model, context, scratch / "weights", config, calls), []),
    }
    if arguments.url:
        real = [ServerAddress(name="real", url=arguments.url, tensor_parallel_size=1, policy_version=-1)]
        sides |= {
            "server, distributed": pusher(broadcast(), real),
            "server, tensor": pusher(TensorTransport(bridge, model, config, calls), real),
            "server, disk": pusher(DiskTransport(bridge, model, context, scratch / "read", config, calls), real),
        }
    return num_bytes, sides


def report(num_bytes: int, seconds: dict[str, list[float]]) -> None:
    """Print a table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{num_bytes / MIB:.0f} MiB · torch {torch.__version__} · {os.cpu_count()} CPUs · {commit}")
    print("| side | seconds, median (all) | MiB/s | over its bare transfer |")
    print("|---|---:|---:|---:|")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        bare = medians["file copy" if name in ("file copy", "disk, written", "server, disk") else "bare broadcast"]
        every = " ".join(f"{value:.2f}" for value in each)
        rate = num_bytes / MIB / medians[name]
        print(f"| {name} | {medians[name]:.2f} ({every}) | {rate:.0f} | {medians[name] / bare:.2f} |")


def main() -> None:
    """Run the benchmark, or its receiver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--api-key")
    parser.add_argument("--role", default="sender", choices=["sender", "receiver"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_upstream()
    with tempfile.TemporaryDirectory(prefix="weight_sync_") as folder:
        scratch = Path(folder)
        method = f"file://{scratch}/store"
        dist.init_process_group(collective_backend(), init_method=method, rank=0, world_size=1)
        if arguments.role == "receiver":
            asyncio.run(Receiver().run())
        arguments.model = arguments.model or scratch / "model"
        if not arguments.model.exists():
            write_model(arguments.model, arguments.mib, arguments.dtype)
        command = [sys.executable, __file__, "--role", "receiver"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver, ExitStack() as resources:
            resources.callback(receiver.kill)
            assert receiver.stdout is not None
            url = f"http://127.0.0.1:{receiver.stdout.readline().strip()}"
            num_bytes, sides = build_sides(arguments, url, scratch, resources)
            report(num_bytes, measure(sides, arguments.rounds))


if __name__ == "__main__":
    main()
