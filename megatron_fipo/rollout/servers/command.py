"""The command line and the environment of one SGLang server."""

import ctypes
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHIM = Path(__file__).parents[2] / "platform" / "sglang_cpu_shim"

# SGLang's Triton, FlashInfer and CUDA graphs do not run on the CPU. The overlapped scheduler needs CUDA streams; idle
# schedulers spin otherwise.
_ON_CPU: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "skip_server_warmup": True,
    "sleep_on_idle": True,
    # By default the KV cache takes most of the machine's memory.
    "max_total_tokens": 65536,
}

# Where one of its processes has crashed, SGLang takes requests for another minute, and answers none, while it looks for
# what there is to write down.
_ENDS_AT_ONCE = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}

# What torchrun and srun told the process beside whose ranks the server starts; a server has ranks of its own.
_OF_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_TORCHRUN = ("TORCHELASTIC_", "ROLE_")
# It needs CUDA. Without it, servers answer calls that release and resume memory, and nothing comes of them.
_NOT_ON_CPU = ("enable_memory_saver",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What all servers of a run have in common; all of it can be written as JSON.

    Attributes:
        arguments: SGLang's launch arguments by name.
        tensor_parallel_size: Ranks of one server.
        nodes_per_server: Nodes that one server's ranks are spread over.
        servers_per_node: Servers on each node.
        start_timeout_s: How long one may take until it is ready.
        first_device: First GPU of a node that is theirs; those before it are the trainer's.
    """

    arguments: dict[str, Any]
    tensor_parallel_size: int
    nodes_per_server: int
    servers_per_node: int
    start_timeout_s: float
    first_device: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlace:
    """Where the ranks of one server on one node are.

    Attributes:
        host: Address that it listens on.
        port: Port of that.
        index: Which server of the node it is.
        node_rank: Which of its nodes this is.
        init_address: HOST:PORT at which the ranks of a server on several nodes meet.
        nccl_port: Port at which ranks on one node meet; SGLang's own choice may be taken when it gets there.
    """

    host: str
    port: int
    index: int = 0
    node_rank: int = 0
    init_address: str | None = None
    nccl_port: int | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"


def server_command(settings: ServerSettings, place: ServerPlace, key_file: Path, cuda: bool) -> list[str]:
    """The command line of a server, or of its part on one node.

    Args:
        settings: Of all servers.
        place: Of this one.
        key_file: YAML file with the server's key: a command line can be seen by every user of the machine.
        cuda: Whether it runs on CUDA devices.
    """
    arguments = {} if cuda else dict(_ON_CPU)
    arguments |= {name: value for name, value in settings.arguments.items() if cuda or name not in _NOT_ON_CPU}
    arguments |= {"host": place.host, "port": place.port, "tp_size": settings.tensor_parallel_size}
    if place.nccl_port is not None:
        arguments["nccl_port"] = place.nccl_port
    if cuda:
        devices = settings.tensor_parallel_size // settings.nodes_per_server
        arguments["base_gpu_id"] = settings.first_device + place.index * devices
    if settings.nodes_per_server > 1:
        arguments |= {
            "nnodes": settings.nodes_per_server,
            "node_rank": place.node_rank,
            "dist_init_addr": place.init_address,
        }
    words = [word for name, value in arguments.items() for word in _words(name, value)]
    return [sys.executable, "-m", "sglang.launch_server", "--config", str(key_file), *words]


def server_environment(settings: ServerSettings, outer: Mapping[str, str], cuda: bool) -> dict[str, str]:
    """The environment of a server.

    Args:
        settings: Of all servers.
        outer: The environment of the process that starts it.
        cuda: Whether it runs on CUDA devices.
    """
    environment = {
        name: value for name, value in outer.items() if name not in _OF_RANKS and not name.startswith(_OF_TORCHRUN)
    }
    environment = _ENDS_AT_ONCE | environment | {"PYTHONUNBUFFERED": "1"}
    if "context_length" in settings.arguments:
        # The model's configuration may say less: a run may train it for longer sequences.
        environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if not cuda:
        environment |= _environment_on_cpu(environment, settings.tensor_parallel_size)
    return environment


def _environment_on_cpu(outer: Mapping[str, str], ranks: int) -> dict[str, str]:
    paths = [str(_SHIM), outer.get("PYTHONPATH", "")]
    changes = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": outer.get("SGLANG_EXTERNAL_MODEL_PACKAGE", "sglang_cpu_models"),
    }
    if ranks > 1:
        # SGLang gives each rank a memory node's cores of its own, and refuses more ranks than memory nodes.
        cores = sorted(os.sched_getaffinity(0))
        bound = [cores[rank % len(cores) :: ranks] or cores for rank in range(ranks)]
        changes["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, each)) for each in bound)
    return changes


def has_cuda() -> bool:
    """Whether this machine has a CUDA device that this process may use; asks the driver, without PyTorch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _words(name: str, value: Any) -> list[str]:
    """An argument as SGLang's command line takes it; its flags are false where they are not given."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
