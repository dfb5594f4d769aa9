"""Servers through agents, where a small HTTP server stands for SGLang: who is there, restarts, and what ends when."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.servers import agent as agent_module
from megatron_fipo.rollout.servers import listener, registry
from megatron_fipo.rollout.servers import pool as pool_module
from megatron_fipo.rollout.servers.agent import ServerAgent, read_controller_file
from megatron_fipo.rollout.servers.pool import TrainerRanks, open_pool
from megatron_fipo.rollout.servers.registry import ServerPool
from megatron_fipo.runtime.errors import RunError
from tests.process_groups import wait_until_empty

STAND_IN = Path(__file__).parents[3] / "stand_in_sglang"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(registry, "FIRST_BACK_OFF_S", 0.05)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text("{}")
    return ModelConfig(path=tmp_path)


def rollout(**sglang: Any) -> RolloutConfig:
    return RolloutConfig(engine="sglang", sglang=SglangConfig(**sglang))


async def until(pool: ServerPool, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(300.0):
        while not holds():
            await pool.wait_for_change(pool.lives, pool.num_coming)


def group_of(folder: Path, name: str) -> int:
    """Process group of a life: that of the process that has its log open."""
    for process in psutil.process_iter():
        try:
            if any(file.path == str(folder / f"{name}.log") for file in process.open_files()):
                return os.getpgid(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    raise AssertionError(f"{name} does not run")


async def status_of(url: str, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{url}/server_info") as reply:
        return reply.status


def test_servers_start_restart_and_end(model: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "servers"

    async def scenario() -> list[int]:
        async with open_pool(model, rollout(servers_per_node=2, max_restarts=2), folder) as pool:
            assert (pool.lives, pool.num_coming) == ((), 2)
            await until(pool, lambda: len(pool.lives) == 2)
            assert [life.name for life in pool.lives] == ["server0.life1", "server1.life1"]
            assert pool.num_coming == 0
            first, second = pool.lives
            # A key of the run's own, which no command line shows.
            assert [await status_of(first.url, key) for key in (pool.api_key, None)] == [200, 401]
            groups = [group_of(folder, life.name) for life in pool.lives]
            assert not any(pool.api_key in line for line in command_lines())

            # One that is asked to be restarted, which leaves at once, and one that dies by itself.
            await pool.restart(first.name, "it does not answer")
            assert [life.name for life in pool.lives] == ["server1.life1"]
            assert pool.num_coming == 1
            os.kill(groups[1], signal.SIGKILL)
            await until(pool, lambda: [life.name for life in pool.lives] == ["server0.life2", "server1.life2"])
            await pool.restart(first.name, "a life that is gone already is left alone")
            assert len(pool.lives) == 2
            return groups + [group_of(folder, life.name) for life in pool.lives]

    for group in asyncio.run(scenario()):
        wait_until_empty(group)


def command_lines(process: psutil.Process | None = None) -> dict[str, psutil.Process]:
    """Processes by their command lines: all, or a process's children."""
    processes = psutil.process_iter() if process is None else process.children()
    found = {}
    for each in processes:
        with contextlib.suppress(psutil.Error):
            found[" ".join(each.cmdline())] = each
    return found


def test_a_server_that_cannot_start_ends_the_run_with_its_log(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "1")

    async def scenario() -> None:
        async with open_pool(model, rollout(max_restarts=1), tmp_path / "servers") as pool:
            with pytest.raises(RunError, match=r"(?s)no SGLang server is left; server 0: .* status 1; .*no memory"):
                await until(pool, lambda: False)

    asyncio.run(scenario())


def test_a_server_that_was_sound_may_be_restarted_as_often_as_a_new_one(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_pool(model, rollout(max_restarts=1), tmp_path / "servers") as pool:
            monkeypatch.setattr(registry, "SOUND_LIFE_S", 0.0)
            for life in ("server0.life1", "server0.life2"):
                await until(pool, lambda life=life: [each.name for each in pool.lives] == [life])
                await pool.restart(life, "it repeats itself")
            monkeypatch.setattr(registry, "SOUND_LIFE_S", 3600.0)
            await until(pool, lambda: bool(pool.lives))
            await pool.restart("server0.life3", "it repeats itself")
            with pytest.raises(RunError, match=r"server 0: it repeats itself \(it was restarted 1 times\)"):
                await until(pool, lambda: False)

    asyncio.run(scenario())


def test_a_lost_agent_takes_its_servers_along_and_is_replaced(model: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "servers"

    async def scenario() -> int:
        async with open_pool(model, rollout(), folder) as pool:
            await until(pool, lambda: len(pool.lives) == 1)
            group = group_of(folder, "server0.life1")
            (agent,) = [child for line, child in command_lines(psutil.Process()).items() if "servers.agent" in line]
            agent.kill()
            await until(pool, lambda: not pool.lives)
            await until(pool, lambda: [life.name for life in pool.lives] == ["server0.life2"])
            return group

    wait_until_empty(asyncio.run(scenario()))
    # It could not remove its servers' key itself.
    assert not list(folder.glob("key_*"))


def test_an_agent_that_hangs_is_replaced_with_its_servers_and_ends_at_last(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "AGENT_LOST_S", 3.0)
    monkeypatch.setattr(pool_module, "AGENT_END_S", 0.5)
    folder = tmp_path / "servers"

    def agents() -> list[psutil.Process]:
        return [child for line, child in command_lines(psutil.Process()).items() if "servers.agent" in line]

    async def scenario() -> list[int]:
        async with open_pool(model, rollout(), folder) as pool:
            await until(pool, lambda: len(pool.lives) == 1)
            groups = [group_of(folder, "server0.life1")]
            (agent,) = agents()
            agent.suspend()
            await until(pool, lambda: [life.name for life in pool.lives] == ["server0.life2"])
            groups.append(group_of(folder, "server0.life2"))
            (agent,) = agents()
            agent.suspend()
        assert not agents()
        return groups

    for group in asyncio.run(scenario()):
        wait_until_empty(group)


def test_an_agent_whose_controller_ends_before_it_speaks_ends_without_a_word(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_fipo.rollout.servers.agent", str(tmp_path)]
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=120.0)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


PROGRAM = """
import asyncio
from pathlib import Path
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.rollout.servers.pool import open_pool

async def own():
    folder = Path({folder!r})
    async with open_pool(ModelConfig(path=folder), RolloutConfig(engine="sglang"), folder / "servers") as pool:
        while not pool.lives:
            await pool.wait_for_change(pool.lives, pool.num_coming)
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(own())
"""


def test_nothing_is_left_when_the_controller_is_killed(model: ModelConfig, tmp_path: Path) -> None:
    async def scenario() -> list[int]:
        controller = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM.format(folder=str(tmp_path))), stdout=asyncio.subprocess.PIPE
        )
        assert controller.stdout is not None
        assert await controller.stdout.readline() == b"ready\n"
        (agent,) = psutil.Process(controller.pid).children()
        groups = [os.getpgid(agent.pid), group_of(tmp_path / "servers", "server0.life1")]
        controller.kill()
        await controller.communicate()
        return groups

    for group in asyncio.run(scenario()):
        wait_until_empty(group)


def test_agents_of_other_nodes_come_and_go(model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes with half a server each: their parts begin and end together."""
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    folder = tmp_path / "servers"
    spread = rollout(num_agents=2, nodes_per_server=2, tensor_parallel_size=2, start_timeout_s=60.0)

    async def scenario() -> None:
        async with open_pool(model, spread, folder) as pool:
            address = read_controller_file(folder)
            assert address is not None
            assert (folder / "controller.json").stat().st_mode & 0o777 == 0o600
            assert await status_of_registration(address.url, "wrong") == 401
            agents = [asyncio.create_task(ServerAgent(address, folder).run()) for _ in range(2)]
            await until(pool, lambda: len(pool.lives) == 1)
            assert pool.lives[0].tensor_parallel_size == 2
            # A third one is not needed.
            with pytest.raises(RunError, match="turned this agent away \\(409\\): the run has all the agents"):
                await ServerAgent(address, folder).run()
            # The part that answers nobody dies, and both begin anew.
            os.kill(group_of(folder, "server0.life1.node1"), signal.SIGKILL)
            await until(pool, lambda: [life.name for life in pool.lives] == ["server0.life2"])
            assert group_of(folder, "server0.life2.node1")
            agents[1].cancel()
            with pytest.raises(RunError, match="server 0: the agent of rollout node 1 has ended"):
                await until(pool, lambda: False)
            # Another one may take its place.
            agents[1] = asyncio.create_task(ServerAgent(address, folder).run())
            while pool.num_coming == 0:
                await asyncio.sleep(0.01)
            await until(pool, lambda: len(pool.lives) == 1)
        async with asyncio.timeout(30.0):
            await asyncio.gather(*agents)
        assert not (folder / "controller.json").exists()

    asyncio.run(scenario())


def test_agents_of_other_nodes_are_not_given_an_address_that_leads_to_themselves(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the /etc/hosts of some distributions has it."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1" if name == "node7" else name)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")

    async def scenario(**sglang: Any) -> None:
        async with open_pool(model, rollout(**sglang), tmp_path / "servers"):
            pass

    with pytest.raises(ConfigError, match=r"SLURMD_NODENAME = node7: must lead other nodes here.*127\.0\.1\.1; set"):
        asyncio.run(scenario(num_agents=1))
    assert listener.job_address({"SLURMD_NODENAME": "10.1.0.7"}) == "10.1.0.7"


def test_servers_beside_the_controller_can_be_reached_by_ranks_of_other_nodes(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    folder, two_nodes = tmp_path / "servers", TrainerRanks(here=4, elsewhere=4)

    async def listening(ranks: TrainerRanks) -> set[str]:
        before = {each.laddr for each in psutil.Process().net_connections()}
        async with open_pool(model, rollout(), folder, ranks):
            return {each.laddr.ip for each in psutil.Process().net_connections() if each.laddr not in before}

    # Not the address that every node has.
    monkeypatch.setenv("SLURMD_NODENAME", "127.0.0.9")
    assert asyncio.run(listening(two_nodes)) == {"127.0.0.9"}
    assert asyncio.run(listening(TrainerRanks(here=8, elsewhere=0))) == {"127.0.0.1"}
    monkeypatch.delenv("SLURMD_NODENAME")
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    with pytest.raises(ConfigError, match="this host's name = .*: must lead other nodes here"):
        asyncio.run(listening(two_nodes))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_servers_that_every_node_finds_in_itself_are_refused(model: ModelConfig, tmp_path: Path, host: str) -> None:
    async def scenario() -> None:
        async with open_pool(model, rollout(urls=(f"http://{host}:1",)), tmp_path, TrainerRanks(here=4, elsewhere=4)):
            pass

    with pytest.raises(ConfigError, match=r"rollout\.sglang\.urls = .* must not be loopback: 4 ranks"):
        asyncio.run(scenario())


def test_a_server_that_cannot_be_run_is_not_waited_for(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    folder = tmp_path / "servers"

    async def scenario() -> str:
        async with open_pool(model, rollout(num_agents=1, max_restarts=0), folder) as pool:
            address = read_controller_file(folder)
            assert address is not None
            agent = asyncio.create_task(ServerAgent(address, folder).run())
            with pytest.raises(RunError, match="no SGLang server is left") as error:
                await asyncio.wait_for(until(pool, lambda: False), 30.0)
        await agent
        return str(error.value)

    # A server takes two ports.
    monkeypatch.setattr(agent_module, "SERVER_PORTS", range(7999, 8000))
    assert "server 0: no port from 7999 to 7999 of 127.0.0.1 is free" in asyncio.run(scenario())
    monkeypatch.setattr(agent_module, "SERVER_PORTS", range(7900, 8900))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    assert "server 0: cannot be run: FileNotFoundError" in asyncio.run(scenario())


def test_an_agent_that_cannot_be_started_is_not_waited_for(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))

    async def scenario() -> None:
        async with open_pool(model, rollout(max_restarts=0), tmp_path / "servers") as pool:
            with pytest.raises(RunError, match=r"server 0: the agent cannot be started: .*absent.*also after 0"):
                await asyncio.wait_for(until(pool, lambda: False), 30.0)

    asyncio.run(scenario())


async def status_of_registration(url: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.post(f"{url}/agents", json={}) as reply:
        return reply.status


def test_an_agent_that_falls_silent_is_lost_and_may_come_back(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    monkeypatch.setattr(listener, "AGENT_LOST_S", 3.0)
    folder = tmp_path / "servers"

    async def scenario() -> list[int]:
        program = "import asyncio, pathlib; from megatron_fipo.rollout.servers.agent import serve; "
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", f"{program}asyncio.run(serve(pathlib.Path({str(folder)!r}), 60.0))"),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with open_pool(model, rollout(num_agents=1), folder) as pool:
                await until(pool, lambda: len(pool.lives) == 1)
                groups = [group_of(folder, "server0.life1")]
                agent.send_signal(signal.SIGSTOP)
                with pytest.raises(RunError, match="the agent of rollout node 0 was not heard of for 3 s"):
                    await until(pool, lambda: False)
                # It learns that nobody counts on it any more, and begins anew.
                agent.send_signal(signal.SIGCONT)
                while pool.num_coming == 0:
                    await asyncio.sleep(0.01)
                await until(pool, lambda: [life.name for life in pool.lives] == ["server0.life2"])
                groups.append(group_of(folder, "server0.life2"))
            _, said = await agent.communicate()
            assert agent.returncode == 0
            assert "the controller turned this agent away (410)" in said.decode()
        finally:
            with contextlib.suppress(ProcessLookupError):
                agent.kill()
        return groups

    for group in asyncio.run(scenario()):
        wait_until_empty(group)


def test_attached_servers_are_used_as_they_are(tmp_path: Path, model: ModelConfig) -> None:
    (tmp_path / "key").write_text("secret\n")

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (tmp_path / "key.yaml").write_text('{"api-key": "secret"}')
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sglang.launch_server", "--port", str(port), "--tp-size", "4"),
            *("--config", str(tmp_path / "key.yaml")),
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{port}"
        attached = rollout(urls=(url,), api_key_file=str(tmp_path / "key"))
        try:
            await wait_until_it_listens(port)
            (tmp_path / "old_key").write_text("an old secret")
            with pytest.raises(
                RunError, match=f"{url} does not answer as .* status 401; see .*api_key_file"
            ) as refused:
                async with open_pool(model, rollout(urls=(url,), api_key_file=str(tmp_path / "old_key")), tmp_path):
                    pass
            assert "an old secret" not in str(refused.value)
            async with open_pool(model, attached, tmp_path) as pool:
                assert pool.api_key == "secret"
                (life,) = pool.lives
                assert (life.url, life.tensor_parallel_size, life.may_restart) == (url, 4, False)
                await pool.restart(life.name, "it repeats itself")
                with pytest.raises(RunError, match=f"no SGLang server is left; {url}: it repeats itself"):
                    await until(pool, lambda: False)
            assert server.returncode is None
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            await server.wait()

    asyncio.run(scenario())


async def wait_until_it_listens(port: int) -> None:
    async with asyncio.timeout(300.0):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


def test_a_key_file_that_is_not_there_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    async def scenario() -> None:
        attached = rollout(urls=("http://127.0.0.1:1",), api_key_file=str(tmp_path / "none"))
        async with open_pool(model, attached, tmp_path):
            pass

    with pytest.raises(
        ConfigError, match=re.escape(f"rollout.sglang.api_key_file = {tmp_path / 'none'}: must be a file")
    ):
        asyncio.run(scenario())
