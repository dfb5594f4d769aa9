"""Processes of a run are killed, it is started again, and it does what the uninterrupted run did, bit by bit."""

from pathlib import Path
from typing import Any

import pytest

import megatron_fipo.display.watch  # noqa: F401  (forked ranks find it imported)
from megatron_fipo.config.load import dump_config
from tests.integration.small_runs import prompts, read_lines, small_run, without_times, write_inputs
from tests.killed_runs import START, Kill, Scale, draw_kills, live, live_through, scale_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

RANKS = 2
PHASES = (START, "rollout", "old_log_probs", "update", "weight_sync", "evaluation", "checkpoint", "export")


class Runs:
    """Runs over one set of inputs, and the one that nobody disturbs.

    Args:
        root: Where everything goes.
    """

    def __init__(self, root: Path) -> None:
        self.root = write_inputs(root)
        words, folder = self.prepare("whole")
        self.whole = live(words, folder, RANKS, "life0", None, None)
        assert self.whole.statuses == [0] * RANKS, (root / "whole.life0.rank0.log").read_text()
        self.result = self.result_of("whole")
        self.scale: Scale = scale_of(folder, read_lines(folder / "metrics.jsonl"))

    def prepare(self, name: str) -> tuple[list[str], Path]:
        """Write a run's configuration; gives the command's words and the run directory."""
        config = small_run(
            self.root,
            name,
            num_steps=5,
            rollout={"over_sampling": 1.5, "carry_over_max_lag": 1, "max_response_tokens": 6},
            checkpoint={"every_steps": 2, "export_dtype": "float32", "verify_export": False},
            evaluation={"num_prompts": 4, "every_steps": 2},
            data=prompts(self.root, held_out="held_out"),
        )
        file = self.root / f"{name}.yaml"
        file.write_text(dump_config(config))
        return ["train", str(file)], config.output_dir

    def result_of(self, name: str) -> dict[str, Any]:
        """All that a run leaves and another one must leave, too."""
        folder = self.root / name
        evaluations = sorted((folder / "evaluations").rglob("*.jsonl"))
        return {
            "metrics": without_times(read_lines(folder / "metrics.jsonl")),
            "samples": (folder / "samples.jsonl").read_bytes(),
            "evaluations": {str(path.relative_to(folder)): path.read_bytes() for path in evaluations},
            "weights": (folder / "export" / "model.safetensors").read_bytes(),
        }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"))


KILLS = (
    Kill(victim="rank 0", phase="update", occurrence=1),
    Kill(victim="rank 1", phase="rollout", occurrence=2),
    Kill(victim="writer", occurrence=1),
    Kill(victim="file", moment=0.6),
    Kill(victim="reward worker", phase="rollout", moment=0.1),
)


def test_a_run_survives_the_death_of_any_of_its_processes(runs: Runs) -> None:
    words, folder = runs.prepare("killed")
    lives = live_through(words, folder, RANKS, KILLS, runs.scale)
    assert [life.killed for life in lives] == [True] * len(KILLS)
    assert [life.left for life in lives] == [[]] * len(KILLS)
    assert runs.result_of("killed") == runs.result


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(5))
def test_random_kills(runs: Runs, seed: int) -> None:
    name = f"random{seed}"
    words, folder = runs.prepare(name)
    lives = live_through(
        words, folder, RANKS, draw_kills(seed, 5, ("rank 0", "rank 1", "writer", "file"), PHASES), runs.scale
    )
    for life in lives:
        assert not life.left or (life.kill is not None and life.kill.phase == START)
    assert runs.result_of(name) == runs.result
