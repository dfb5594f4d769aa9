"""SGLang servers: where they come from, and how they are reached."""

import math
from dataclasses import field
from typing import Any
from urllib.parse import urlsplit

from megatron_fipo.config.base import config_class, require


@config_class
class SglangConfig:
    """Servers that generate, where rollout.engine is "sglang"."""

    urls: tuple[str, ...] = ()
    """Servers that run already, such as http://10.1.0.7:30000; they are used as they are and never restarted. Empty:
    servers are started for this run."""

    api_key_file: str | None = None
    """File with the key that servers of `urls` ask for. Servers that this run starts get a key of their own."""

    num_agents: int = 0
    """Rollout nodes whose agents start the servers and register with this run (slurm/README.md); 0 starts them on the
    node of the controller."""

    servers_per_node: int = 1
    """Servers on each rollout node; with nodes_per_server above 1 it must be 1."""

    tensor_parallel_size: int = 1
    """Ranks of one server."""

    nodes_per_server: int = 1
    """Rollout nodes that one server's ranks are spread over."""

    server_arguments: dict[str, Any] = field(default_factory=dict)
    """Further launch arguments of SGLang by name, such as mem_fraction_static. Names that SGLang does not have, and
    those that this program sets itself, are refused."""

    use_router: bool = False
    """Send requests through sglang-router, which this run starts beside the controller and which then chooses their
    servers. Without it the controller chooses, and sends to them itself."""

    start_timeout_s: float = 1800.0
    """How long a server may take until it is ready, in seconds."""

    request_timeout_s: float = 14400.0
    """How long one attempt at a request may take, in seconds, the time in its server's queue included; then it is
    aborted and tried again. Servers that hang are found by themselves, within minutes."""

    max_attempts: int = 5
    """Times that one request is tried, on whatever server, before the run stops."""

    max_restarts: int = 3
    """Times that one server is restarted before the run goes on without it; without any server it stops. An hour of
    service begins the count anew."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        for name in ("servers_per_node", "tensor_parallel_size", "nodes_per_server", "max_attempts"):
            value = getattr(self, name)
            require(value >= 1, field=name, value=value, rule="must be at least 1", way_out="set it to 1 or more")
        for name in ("num_agents", "max_restarts"):
            value = getattr(self, name)
            require(value >= 0, field=name, value=value, rule="must not be negative", way_out="set it to 0 or more")
        for name in ("start_timeout_s", "request_timeout_s"):
            value = getattr(self, name)
            require(
                0 < value < math.inf,
                field=name,
                value=value,
                rule="must be finite and greater than 0",
                way_out="give seconds",
            )
        for url in self.urls:
            parts = urlsplit(url)
            require(
                parts.scheme in ("http", "https") and bool(parts.hostname),
                field="urls",
                value=url,
                rule="must be an address that begins with http:// or https://",
                way_out="write it as http://HOST:PORT",
            )
        servers = [url.rstrip("/") for url in self.urls]
        require(
            len(set(servers)) == len(servers),
            field="urls",
            value=self.urls,
            rule="must name each server once",
            way_out="leave the second one away",
        )
        self._check_nodes()

    def _check_nodes(self) -> None:
        require(
            not (self.urls and self.num_agents),
            field="num_agents",
            value=self.num_agents,
            rule="must be 0 with urls: servers that run already have no agents",
            way_out="drop either",
        )
        require(
            self.nodes_per_server == 1 or self.servers_per_node == 1,
            field="servers_per_node",
            value=self.servers_per_node,
            rule=f"must be 1 where one server takes {self.nodes_per_server} nodes",
            way_out="set it to 1",
        )
        require(
            self.nodes_per_server == 1 or (self.num_agents > 0 and self.num_agents % self.nodes_per_server == 0),
            field="nodes_per_server",
            value=self.nodes_per_server,
            rule=f"must divide num_agents = {self.num_agents}",
            way_out="set num_agents to a multiple of it",
        )
        require(
            self.tensor_parallel_size % self.nodes_per_server == 0,
            field="tensor_parallel_size",
            value=self.tensor_parallel_size,
            rule=f"must be a multiple of nodes_per_server = {self.nodes_per_server}",
            way_out="spread the ranks evenly",
        )
