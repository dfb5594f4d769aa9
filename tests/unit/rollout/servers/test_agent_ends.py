"""How `megatron-fipo serve` ends on a signal."""

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import pytest

from megatron_fipo.config.load import dump_config
from tests.integration.small_runs import small_run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_agent_that_waits_for_its_controller_ends_with_one_line(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    config = small_run(tmp_path, "run", rollout={"engine": "sglang"})
    (tmp_path / "config.yaml").write_text(dump_config(config))

    async def scenario() -> tuple[int | None, str]:
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "megatron_fipo.cli", "serve", str(tmp_path / "config.yaml")),
            *("--rollout.sglang.num_agents", "1"),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert agent.stderr is not None
            # It says so when signals have their meaning.
            waits = (await agent.stderr.readline()).decode()
            assert "waits for the controller's address in" in waits
            # What asks the trainer to save does not end it.
            agent.send_signal(signal.SIGUSR1)
            agent.send_signal(number)
            _, said = await agent.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                agent.kill()
        return agent.returncode, said.decode()

    assert asyncio.run(scenario()) == (status, f"megatron-fipo: the agent ended on {number.name}\n")
