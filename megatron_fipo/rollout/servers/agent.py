"""The agent of a rollout node: it owns the node's servers, says how they are, and does what the controller orders.

`python -m megatron_fipo.rollout.servers.agent FOLDER` is how the controller starts one on its own node; it reads where
the controller is from its input, and ends with that. `megatron-fipo serve` is one that finds the controller in a run
directory. Either ends its servers when it ends, and ends when the controller is gone.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from megatron_fipo.rollout.servers.command import (
    ServerPlace,
    ServerSettings,
    has_cuda,
    server_command,
    server_environment,
)
from megatron_fipo.rollout.servers.process import ServerEndedError, ServerProcess
from megatron_fipo.rollout.servers.registry import Order, Report
from megatron_fipo.runtime.errors import RunError

log = logging.getLogger(__name__)

CONTROLLER_FILE = "controller.json"
# A server listens a minute after its port was chosen: not at one that the kernel may give to a connection meanwhile.
SERVER_PORTS = range(7900, 8900)
BEAT_S = 1.0
"""Time between two reports; a change is reported at once."""
CONTROLLER_LOST_S = 10.0
"""How long nobody may listen at the controller's address."""
CONTROLLER_SILENT_S = 60.0
"""How long the controller may take for an answer; it may be busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerAddress:
    """Where the controller listens.

    Attributes:
        url: Its address.
        token: What it wants to be shown.
    """

    url: str
    token: str


class _ForgottenError(RunError):
    """The controller does not count on this agent any more, and may on a new one."""


class ServerAgent:
    """An agent.

    Args:
        controller: Where the controller listens.
        folder: Where the servers' logs go.
    """

    def __init__(self, controller: ControllerAddress, folder: Path) -> None:
        self._controller, self._folder = controller, folder
        self._host = _address_towards(controller.url)
        self._cuda = has_cuda()
        self._reports: dict[str, Report] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._ports: set[int] = set()
        self._changed = asyncio.Event()
        self._answered_at = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Register, and run what is ordered until the controller says that the run has ended.

        Raises:
            RunError: The controller is gone, or does not want this agent.
        """
        headers = {"Authorization": f"Bearer {self._controller.token}"}
        timeout = aiohttp.ClientTimeout(total=CONTROLLER_SILENT_S, sock_connect=CONTROLLER_LOST_S)
        async with aiohttp.ClientSession(self._controller.url, headers=headers, timeout=timeout) as session:
            welcome = await self._ask(session, "/agents", {"host": self._host, "free_port": self._free_port()})
            self._settings = ServerSettings(**welcome["settings"])
            self._key_file = self._folder / f"key_{welcome['key']}.yaml"
            with open(os.open(self._key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({"api-key": welcome["api_key"]}, file)
            try:
                await self._obey(session, f"/agents/{welcome['key']}")
            finally:
                self._follow(())
                await asyncio.gather(*self._ending, return_exceptions=True)
                # The controller removes what agents have left, and may have taken this one for gone.
                self._key_file.unlink(missing_ok=True)
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    await session.delete(f"/agents/{welcome['key']}")

    async def _obey(self, session: aiohttp.ClientSession, path: str) -> None:
        while True:
            self._changed.clear()
            reports = [asdict(report) for report in self._reports.values()]
            reply = await self._ask(session, path, {"free_port": self._free_port(), "reports": reports})
            if reply["end"]:
                return
            self._follow([Order(**order) for order in reply["orders"]])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._changed.wait()

    async def _ask(self, session: aiohttp.ClientSession, path: str, message: dict[str, Any]) -> Any:
        """Give a message to the controller; returns its answer."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with session.post(path, json=message) as reply:
                    if reply.status != 200:
                        kind = _ForgottenError if reply.status == HTTPStatus.GONE else RunError
                        raise kind(f"the controller turned this agent away ({reply.status}): {await reply.text()}")
                    self._answered_at = loop.time()
                    return await reply.json()
            except TimeoutError:
                raise RunError(f"the controller did not answer for {CONTROLLER_SILENT_S:g} s") from None
            except aiohttp.ClientError as error:
                if loop.time() - self._answered_at > CONTROLLER_LOST_S:
                    raise RunError(f"the controller is gone: {error}") from error
                await asyncio.sleep(BEAT_S / 2)

    def _free_port(self) -> int:
        return _free_ports(self._host, 1, self._ports)[0]

    def _follow(self, orders: Sequence[Order]) -> None:
        """Run what is ordered and nothing else."""
        names = {order.name for order in orders}
        self._reports = {name: report for name, report in self._reports.items() if name in names}
        for name in self._running.keys() - names:
            task = self._running.pop(name)
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        for order in orders:
            if order.name not in self._running:
                self._reports[order.name] = Report(name=order.name)
                self._running[order.name] = asyncio.create_task(self._live(order, tuple(self._ending)))

    async def _live(self, order: Order, before: Sequence[asyncio.Task[None]]) -> None:
        """One life of a server's part on this node, once those that it may replace are gone; its end is reported."""
        if before:
            await asyncio.wait(before)
        ports: list[int] = []
        try:
            ports = _free_ports(self._host, 2, self._ports)
            # Nobody listens on them for a minute yet.
            self._ports.update(ports)
            ended = await self._run_server(order, *ports)
        except (ServerEndedError, RunError) as error:
            ended = str(error)
        except Exception as error:
            log.exception("%s cannot be run", order.name)
            ended = f"cannot be run: {error!r}"
        finally:
            self._ports.difference_update(ports)
        self._report(order.name, ended=ended)

    async def _run_server(self, order: Order, port: int, nccl_port: int) -> str:
        """Start a server's part, and say when it is ready; returns how it ended."""
        place = ServerPlace(
            host=self._host,
            port=port,
            index=order.index,
            node_rank=order.node_rank,
            init_address=order.init_address,
            nccl_port=nccl_port,
        )
        part = f".node{order.node_rank}" if self._settings.nodes_per_server > 1 else ""
        command = server_command(self._settings, place, self._key_file, self._cuda)
        environment = server_environment(self._settings, os.environ, self._cuda)
        server = await ServerProcess.start(command, environment, self._folder / f"{order.name}{part}.log")
        log.info("%s%s runs as process group %d, log %s", order.name, part, server.group, server.log)
        try:
            if order.node_rank == 0:
                await server.wait_ready(place.url, self._settings.start_timeout_s)
                self._report(order.name, url=place.url)
            return await server.wait()
        finally:
            await server.stop()

    def _report(self, name: str, **news: str) -> None:
        if name in self._reports:
            self._reports[name] = replace(self._reports[name], **news)
            self._changed.set()


async def serve(folder: Path, patience_s: float) -> int:
    """Run an agent for the run whose controller leaves its address in `folder`.

    Args:
        folder: `RunDirectory.servers`.
        patience_s: How long to wait for a controller.

    Returns:
        Number of the signal that ended it; 0 where the run has ended.

    Raises:
        RunError: There is none, or it is gone.
    """
    return await _run_until_signal(_find_and_serve(folder, patience_s))


async def _find_and_serve(folder: Path, patience_s: float) -> None:
    log.info("waits for the controller's address in %s", folder)
    try:
        async with asyncio.timeout(patience_s):
            while (controller := read_controller_file(folder)) is None or not await _listens(controller):
                await asyncio.sleep(BEAT_S)
    except TimeoutError:
        raise RunError(f"no controller left its address in {folder} for {patience_s:g} s") from None
    while True:
        # A new one where the controller has given up the one before: it was silent for too long.
        try:
            return await ServerAgent(controller, folder).run()
        except _ForgottenError as error:
            log.warning("%s; it has ended its servers, and registers anew", error)


def read_controller_file(folder: Path) -> ControllerAddress | None:
    """What a controller left in a folder for agents of other nodes; None where there is nothing."""
    try:
        return ControllerAddress(**json.loads((folder / CONTROLLER_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


async def _listens(controller: ControllerAddress) -> bool:
    """Whether somebody listens there: the file may be an earlier attempt's."""
    parts = urlsplit(controller.url)
    try:
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        return False
    writer.close()
    return True


async def _run_until_signal(agent: Coroutine[Any, Any, None]) -> int:
    """Run an agent; returns the number of the signal that ended it, 0 without one."""
    loop, task, numbers = asyncio.get_running_loop(), asyncio.ensure_future(agent), [0]

    def end(number: int) -> None:
        numbers.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    # Sent to a whole job, it asks the trainer to save and end, and the agent ends with that.
    loop.add_signal_handler(signal.SIGUSR1, lambda: None)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return numbers[-1]


async def _run_on_leash(folder: Path) -> None:
    """Run an agent until its input ends, which first says where the controller is."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    controller = await reader.readline()
    if not controller:
        # It ended before it could say.
        return
    agent = ServerAgent(ControllerAddress(**json.loads(controller)), folder)
    running = asyncio.ensure_future(_run_until_signal(agent.run()))
    leash = asyncio.ensure_future(reader.read())
    await asyncio.wait([running, leash], return_when=asyncio.FIRST_COMPLETED)
    leash.cancel()
    if not running.done():
        os.kill(os.getpid(), signal.SIGTERM)
    await running


def _address_towards(url: str) -> str:
    """This node's address on the way to another one."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing.
        probe.connect((parts.hostname, parts.port))
        address: str = probe.getsockname()[0]
        return address


def _free_ports(host: str, count: int, taken: Collection[int]) -> list[int]:
    """Ports that nobody listens on; at random, so that agents of several runs on a node seldom choose the same.

    Args:
        host: Address to listen on.
        count: How many.
        taken: Ports on which somebody will listen soon.
    """
    found: list[int] = []
    for port in random.sample(SERVER_PORTS, len(SERVER_PORTS)):
        if len(found) < count and port not in taken:
            with contextlib.suppress(OSError), socket.create_server((host, port)):
                found.append(port)
    if len(found) < count:
        raise RunError(f"no port from {SERVER_PORTS[0]} to {SERVER_PORTS[-1]} of {host} is free")
    return found


if __name__ == "__main__":
    from megatron_fipo.runtime.logging import setup_logging

    setup_logging("agent")
    try:
        asyncio.run(_run_on_leash(Path(sys.argv[1])))
    except RunError as problem:
        sys.exit(f"the agent ends: {problem}")
