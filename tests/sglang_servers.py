"""The one SGLang server that all tests of a session share, where SGLang is installed. It takes a minute to start.

A test that changes its weights puts back those of `model`; tests that end it have the mark `last`.
"""

import asyncio
import importlib.util
import json
import os
import socket
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.rollout.servers.command import (
    ServerPlace,
    ServerSettings,
    has_cuda,
    server_command,
    server_environment,
)
from megatron_fipo.rollout.servers.process import ServerProcess

START_TIMEOUT_S = 900.0
API_KEY = "the key of the tests"

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that is ready.

    Attributes:
        url: Where it answers.
        api_key: What it asks for.
        model: Folder of the model that it serves.
        other_model: Folder of the same model with other weights.
        process: Its processes.
        loop: The event loop that owns them, in a thread of its own.
    """

    url: str
    api_key: str
    model: Path
    other_model: Path
    process: ServerProcess
    loop: asyncio.AbstractEventLoop

    def run[T](self, call: Coroutine[Any, Any, T]) -> T:
        """Do something on the loop that owns the server."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(call, self.loop)
        return future.result(START_TIMEOUT_S)


@contextmanager
def running_server(
    folder: Path, *, architecture: str = "qwen2", tensor_parallel_size: int = 1, **arguments: Any
) -> Iterator[RunningServer]:
    """Start a server of a tiny model in float32, and end it.

    Args:
        folder: Where its models and its log go.
        architecture: See `write_tiny_model`.
        tensor_parallel_size: Its ranks.
        arguments: Further launch arguments of SGLang.
    """
    # Every test session imports this module, and transformers takes seconds.
    from tests.tiny_models import write_tiny_model

    model = write_tiny_model(folder / "model", architecture)
    other_model = write_tiny_model(folder / "other_model", architecture, seed=1)
    key_file = folder / "key.yaml"
    key_file.write_text(json.dumps({"api-key": API_KEY}))
    small = {"context_length": 256, "max_total_tokens": 8192, "max_running_requests": 16}
    settings = ServerSettings(
        arguments={"model_path": str(model), "dtype": "float32", "skip_tokenizer_init": True} | small | arguments,
        tensor_parallel_size=tensor_parallel_size,
        nodes_per_server=1,
        servers_per_node=1,
        start_timeout_s=START_TIMEOUT_S,
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = ServerPlace(host="127.0.0.1", port=probe.getsockname()[1])
    command = server_command(settings, place, key_file, has_cuda())
    environment = server_environment(settings, os.environ | {"HF_HUB_OFFLINE": "1"}, has_cuda())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run[T](call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, loop).result()

    try:
        process = run(ServerProcess.start(command, environment, folder / "server.log"))
        try:
            run(process.wait_ready(place.url, START_TIMEOUT_S))
            yield RunningServer(
                url=place.url, api_key=API_KEY, model=model, other_model=other_model, process=process, loop=loop
            )
        finally:
            run(process.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server that tests share: dense, one rank."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    with running_server(tmp_path_factory.mktemp("sglang_server")) as server:
        yield server
