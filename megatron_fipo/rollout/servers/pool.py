"""The servers that a configuration asks for: attached to, or started through agents."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.servers.agent import CONTROLLER_FILE
from megatron_fipo.rollout.servers.command import ServerSettings
from megatron_fipo.rollout.servers.listener import ServerListener, is_loopback, job_address, write_controller_file
from megatron_fipo.rollout.servers.registry import ServerLife, ServerPool, ServerRegistry
from megatron_fipo.rollout.servers.settings import server_settings
from megatron_fipo.runtime.child_process import child_environment
from megatron_fipo.runtime.errors import RunError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
ATTACH_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 60.0
AGENT_END_S = 5.0
"""How long an agent that has said good-bye or fallen silent may take to end; one that was stopped never would."""
_AGENT_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRanks:
    """Ranks of the trainer, as counted from the controller's node.

    Attributes:
        here: How many are on that node, each with a GPU.
        elsewhere: How many are on other nodes, from where they speak to servers, too.
    """

    here: int
    elsewhere: int

    @classmethod
    def of_launcher(cls, environment: Mapping[str, str]) -> "TrainerRanks":
        """What a launcher has told rank 0, which is on the controller's node.

        Args:
            environment: Rank 0's environment; the controller's own has nothing of this.
        """
        total = int(environment.get("WORLD_SIZE", "1"))
        here = int(environment.get("LOCAL_WORLD_SIZE", str(total)))
        return cls(here=here, elsewhere=total - here)


NO_RANKS = TrainerRanks(here=0, elsewhere=0)


@asynccontextmanager
async def open_pool(
    model: ModelConfig, rollout: RolloutConfig, folder: Path, ranks: TrainerRanks = NO_RANKS
) -> AsyncIterator[ServerPool]:
    """Attach to servers, or have them started, and end those at last; they need not be ready yet inside the block.

    Args:
        model: The model.
        rollout: Generation.
        folder: Where the controller's address and the servers' logs go: `RunDirectory.servers`.
        ranks: Ranks of the trainer; servers on their node take GPUs behind theirs.

    Raises:
        ConfigError: The key file cannot be read, or an address leads other nodes to themselves.
        RunError: A server that runs already does not answer.
    """
    if rollout.sglang.urls:
        _check_urls(rollout.sglang.urls, ranks)
        yield await AttachedServers.open(rollout.sglang)
        return
    settings = server_settings(model, rollout, 0 if rollout.sglang.num_agents else ranks.here)
    others_come = rollout.sglang.num_agents > 0 or ranks.elsewhere > 0
    # Servers listen where their agent finds the controller.
    host = job_address(os.environ) if others_come else LOOPBACK
    async with _started(settings, rollout.sglang, folder, host) as registry:
        yield registry


class AttachedServers:
    """Servers that run already; one that fails is left out from then on.

    Args:
        lives: The servers.
        api_key: What they ask for.
    """

    num_coming = 0

    def __init__(self, lives: Sequence[ServerLife], api_key: str | None) -> None:
        self.lives = tuple(lives)
        self.api_key = api_key
        self._lost: list[str] = []
        self._changed = asyncio.Event()

    @classmethod
    async def open(cls, config: SglangConfig) -> "AttachedServers":
        """Ask each server for its size.

        Raises:
            ConfigError: The key file cannot be read.
            RunError: One does not answer.
        """
        key = _read_key(config.api_key_file)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = aiohttp.ClientTimeout(total=ATTACH_TIMEOUT_S)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            sizes = await asyncio.gather(*(_tensor_parallel_size(session, url) for url in config.urls))
        lives = [
            ServerLife(name=url, url=url.rstrip("/"), tensor_parallel_size=size, may_restart=False)
            for url, size in zip(config.urls, sizes, strict=True)
        ]
        return cls(lives, key)

    async def wait_for_change(self, known: Sequence[ServerLife], known_coming: int) -> None:
        """See `ServerPool`."""
        while self.lives and self.lives == tuple(known) and known_coming == 0:
            await self._changed.wait()
        if not self.lives:
            raise RunError("no SGLang server is left; " + "; ".join(self._lost))

    async def restart(self, name: str, reason: str) -> None:
        """See `ServerPool`."""
        if all(life.name != name for life in self.lives):
            return
        log.warning("%s: %s; the run goes on without this server, which it did not start", name, reason)
        self.lives = tuple(life for life in self.lives if life.name != name)
        self._lost.append(f"{name}: {reason}")
        self._changed.set()
        self._changed = asyncio.Event()


def _check_urls(urls: Sequence[str], ranks: TrainerRanks) -> None:
    for url in urls:
        require(
            ranks.elsewhere == 0 or not is_loopback(urlsplit(url).hostname or ""),
            field="rollout.sglang.urls",
            value=url,
            rule=f"must not be loopback: {ranks.elsewhere} ranks are on other nodes, and would look on their own",
            way_out="have the server listen on its node's address, and write that",
        )


def _read_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            field="rollout.sglang.api_key_file",
            value=path,
            rule=f"must be a file with the servers' key ({error})",
            way_out="write the key into it, or set it to null where the servers ask for none",
        ) from error


async def _tensor_parallel_size(session: aiohttp.ClientSession, url: str) -> int:
    try:
        async with session.get(f"{url.rstrip('/')}/server_info") as reply:
            reply.raise_for_status()
            return int((await reply.json())["tp_size"])
    except aiohttp.ClientResponseError as error:
        # With its request, an error tells the key.
        way_out = "; see rollout.sglang.api_key_file" if error.status in (401, 403) else ""
        raise RunError(
            f"rollout.sglang.urls: {url} does not answer as an SGLang server does: status {error.status}{way_out}"
        ) from None
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        raise RunError(f"rollout.sglang.urls: {url} does not answer: {error or type(error).__name__}") from None
    except (aiohttp.ClientError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"rollout.sglang.urls: {url} does not answer as an SGLang server does ({type(error).__name__})"
        ) from None


@asynccontextmanager
async def _started(
    settings: ServerSettings, config: SglangConfig, folder: Path, host: str
) -> AsyncIterator[ServerRegistry]:
    """Have servers started through agents: those of other nodes, or one beside this process."""
    registry = ServerRegistry(
        settings,
        num_agents=max(config.num_agents, 1),
        max_restarts=config.max_restarts,
        api_key=secrets.token_hex(32),
        agents_return=config.num_agents == 0,
    )
    token = secrets.token_hex(32)
    listener = ServerListener(registry, token)
    url = await listener.open(host)
    folder.mkdir(parents=True, exist_ok=True)
    controller_file = folder / CONTROLLER_FILE
    tasks = [asyncio.create_task(listener.watch_agents())]
    if config.num_agents:
        write_controller_file(controller_file, url, token)
        asyncio.get_running_loop().call_later(
            config.start_timeout_s, registry.stop_hoping, f"no agent came within {config.start_timeout_s:g} s"
        )
    else:
        tasks.append(asyncio.create_task(_keep_agent(registry, json.dumps({"url": url, "token": token}), folder)))
    try:
        yield registry
    finally:
        registry.closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await registry.wait_for_departures()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        controller_file.unlink(missing_ok=True)
        # Of agents that were killed.
        for key_file in folder.glob("key_*.yaml"):
            key_file.unlink(missing_ok=True)
        await listener.close()


async def _keep_agent(registry: ServerRegistry, controller: str, folder: Path) -> None:
    """Have an agent beside this process, and another one where it ends."""
    reason = ""
    for _ in range(registry.max_restarts + 1):
        try:
            reason = f"the agent ended with status {await _run_agent(registry, controller, folder)}"
        except OSError as error:
            reason = f"the agent cannot be started: {error}"
        if registry.closing:
            return
        for agent in registry.agents:
            registry.lose(agent, reason)
        await asyncio.sleep(_AGENT_PAUSE_S)
    registry.stop_hoping(f"{reason}, also after {registry.max_restarts} restarts")


async def _run_agent(registry: ServerRegistry, controller: str, folder: Path) -> int:
    """Run an agent until it ends or hangs; it ends its servers and itself when this process or this call ends."""
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "megatron_fipo.rollout.servers.agent", str(folder)),
        stdin=asyncio.subprocess.PIPE,
        # What a terminal or Slurm sends to all processes comes to this one, which ends the agent in order.
        start_new_session=True,
        env=child_environment(),
    )
    assert agent.stdin is not None
    ended = asyncio.ensure_future(agent.wait())
    lost = asyncio.ensure_future(_wait_for_loss(registry))
    try:
        agent.stdin.write(controller.encode() + b"\n")
        await asyncio.wait([ended, lost], return_when=asyncio.FIRST_COMPLETED)
    finally:
        lost.cancel()
        agent.stdin.close()
        await asyncio.wait([ended], timeout=AGENT_END_S)
        if not ended.done():
            # Its servers end with it.
            agent.kill()
        status = await ended
    return status


async def _wait_for_loss(registry: ServerRegistry) -> None:
    """Wait until the agent has registered and is gone again, or has had its time to register."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(registry.settings.start_timeout_s):
            await registry.wait_for_agents()
    await registry.wait_for_departures()
