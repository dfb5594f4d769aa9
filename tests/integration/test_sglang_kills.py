"""Runs that generate with a real SGLang server: ranks and controller are killed, and every group is used once.

The server outlives them, as one that is given by its URL does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import megatron_fipo.display.watch  # noqa: F401  (forked ranks find it imported)
from megatron_fipo.config.load import dump_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.journal import journal_path, read_journal
from tests.integration.small_runs import prompts, read_lines, small_run, without_times, write_inputs
from tests.killed_runs import START, Kill, Life, Scale, Victim, draw_kills, live_through
from tests.server_faults import check_every_draw_ends_once
from tests.sglang_servers import RunningServer, needs_sglang

pytestmark = [pytest.mark.distributed, needs_sglang, pytest.mark.timeout(900)]

RANKS, STEPS = 2, 5
# Seconds of a phase on two cores; a kill's moment is somewhere in them.
SCALE = Scale(
    seconds={START: 6.0, "rollout": 0.6, "old_log_probs": 0.05, "update": 0.2, "weight_sync": 0.5, "evaluation": 0.3},
    file_events=120,
    bytes_written=3_000_000,
)
PHASES = (START, "rollout", "update", "weight_sync", "evaluation")
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "asynchronous": {"policy_lag": 1, "partial_rollouts": True, "over_sampling": 1.5},
}


class ServedRun:
    """A run, and its metrics after each of its lives."""

    def __init__(self, root: Path, name: str, server: RunningServer, mode: str) -> None:
        key_file = root / "key"
        key_file.write_text(server.api_key)
        sglang = SglangConfig(urls=(server.url,), api_key_file=str(key_file))
        self.config: RunConfig = small_run(
            root,
            name,
            num_steps=STEPS,
            model={"path": server.model, "dtype": "float32"},
            data=prompts(root, held_out="held_out"),
            rollout={"engine": "sglang", "sglang": sglang} | MODES[mode],
            checkpoint={"every_steps": 2, "keep_last": 1000, "export_dtype": "float32", "verify_export": False},
            evaluation={"num_prompts": 4, "every_steps": 2},
        )
        self.file = root / f"{name}.yaml"
        self.file.write_text(dump_config(self.config))
        self.told: dict[int, dict[str, Any]] = {}
        self.repeated: list[int] = []

    def live_through(self, kills: Sequence[Kill]) -> list[Life]:
        """Live, and see that every step that is done again does what it did before."""
        return live_through(["train", str(self.file)], self.config.output_dir, RANKS, kills, SCALE, self._compare)

    def _compare(self, number: int, life: Life) -> None:
        path = self.config.output_dir / "metrics.jsonl"
        lines = {line["step"]: line for line in without_times(read_lines(path))} if path.exists() else {}
        for step, line in lines.items():
            if step in self.told and step > 0:
                self.repeated.append(step)
                assert trained(line) == trained(self.told[step]), f"step {step} in life {number}"
        self.told |= lines

    def check(self) -> None:
        """See that nothing is lost, and nothing is used twice."""
        assert [line["step"] for line in read_lines(self.config.output_dir / "metrics.jsonl")] == list(range(STEPS + 1))
        journal = self.config.output_dir / "journal"
        entries = [read_journal(journal_path(journal, step)) for step in range(1, STEPS + 1)]
        check_every_draw_ends_once(entries, self.config.rollout)


def trained(line: dict[str, Any]) -> dict[str, Any]:
    """What a step's training gave; evaluation asks servers, which do not repeat themselves."""
    return {key: value for key, value in line.items() if not key.startswith(("eval/", "rollout/canary"))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("sglang_kills"))


def test_the_journal_gives_a_killed_run_its_batches_again(root: Path, sglang_server: RunningServer) -> None:
    run = ServedRun(root, "synchronous", sglang_server, "synchronous")
    # In the third step's update, whose batch is in the journal, and after the checkpoint of the second; then, in the
    # same step again, while the controller is asked for the fourth step's.
    kills = [
        Kill(victim="rank 1", phase="update", occurrence=3),
        Kill(victim="controller", phase="rollout", occurrence=2),
    ]
    lives = run.live_through(kills)
    assert [life.killed for life in lives] == [True, True, False]
    assert lives[-1].statuses == [0] * RANKS and not any(life.left for life in lives)
    assert 3 in run.repeated
    run.check()


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_random_kills(root: Path, sglang_server: RunningServer, mode: str, seed: int) -> None:
    run = ServedRun(root, f"{mode}{seed}", sglang_server, mode)
    victims: tuple[Victim, ...] = ("rank 0", "rank 1", "controller", "reward worker", "file", "writer")
    lives = run.live_through(draw_kills(seed, 4, victims, PHASES))
    for life in lives:
        assert not life.left or (life.kill is not None and life.kill.phase == START)
    run.check()
