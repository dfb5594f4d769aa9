"""Runs that are killed again and again at random moments, and what each must leave all the same."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import megatron_fipo.display.watch  # noqa: F401  (forked ranks find it imported)
from megatron_fipo.config.load import dump_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.journal import journal_path, read_journal
from tests.integration.small_runs import prompts, read_lines, small_run, without_times, write_inputs
from tests.killed_runs import START, Kill, Life, Scale, Victim, draw_kills, live, live_through, scale_of
from tests.server_faults import check_every_draw_ends_once
from tests.sglang_servers import RunningServer

RANKS = 2
KILLS_OF_A_RUN = 5
REPORT_VARIABLE, COUNT_VARIABLE = "MEGATRON_FIPO_KILL_REPORT", "MEGATRON_FIPO_KILLS"


class Subject(Protocol):
    """A kind of run.

    Attributes:
        victims: What may be killed in it.
        phases: When.
    """

    victims: Sequence[Victim]
    phases: Sequence[str]

    def live_through(self, name: str, kills: Sequence[Kill]) -> list[Life]:
        """Do a run, and see that it leaves what it must."""
        ...


class EmbeddedRuns:
    """Runs with the embedded engine, and the one that nobody disturbs, which all must repeat bit by bit.

    Args:
        root: Where everything goes.
        num_steps: Steps of each.
    """

    victims: Sequence[Victim] = ("rank 0", "rank 1", "file", "writer", "asked 0", "asked 1", "reward worker")
    phases = (START, "rollout", "old_log_probs", "update", "weight_sync", "evaluation", "checkpoint", "export")

    def __init__(self, root: Path, num_steps: int = 5) -> None:
        self.root, self.num_steps = write_inputs(root), num_steps
        words, folder = self._prepare("whole")
        whole = live(words, folder, RANKS, "life0", None, None)
        assert whole.statuses == [0] * RANKS, Path(f"{folder}.life0.rank0.log").read_text()
        self._result = self._result_of("whole")
        self._scale = scale_of(folder, read_lines(folder / "metrics.jsonl"))

    def live_through(self, name: str, kills: Sequence[Kill]) -> list[Life]:
        """Do a run, and compare all that it leaves."""
        words, folder = self._prepare(name)
        lives = live_through(words, folder, RANKS, kills, self._scale)
        result = self._result_of(name)
        differs = [what for what, content in self._result.items() if result[what] != content]
        assert not differs, f"{name}: {differs}"
        return lives

    def _prepare(self, name: str) -> tuple[list[str], Path]:
        config = small_run(
            self.root,
            name,
            num_steps=self.num_steps,
            rollout={"over_sampling": 1.5, "carry_over_max_lag": 1, "max_response_tokens": 6},
            checkpoint={"every_steps": 2, "export_dtype": "float32", "verify_export": False},
            evaluation={"num_prompts": 4, "every_steps": 2},
            data=prompts(self.root, held_out="held_out"),
        )
        file = self.root / f"{name}.yaml"
        file.write_text(dump_config(config))
        return ["train", str(file)], config.output_dir

    def _result_of(self, name: str) -> dict[str, Any]:
        folder = self.root / name
        evaluations = sorted((folder / "evaluations").rglob("*.jsonl"))
        return {
            "metrics": without_times(read_lines(folder / "metrics.jsonl")),
            "samples": (folder / "samples.jsonl").read_bytes(),
            "evaluations": {str(path.relative_to(folder)): path.read_bytes() for path in evaluations},
            "weights": (folder / "export" / "model.safetensors").read_bytes(),
        }


class ServedRuns:
    """Runs with a server that outlives them: each draw must end once, and a step that is repeated must be the same.

    Args:
        root: Where everything goes.
        server: The server; without one each life starts its own, which may be killed, too.
        rollout: Further fields of the rollout section.
        num_steps: Steps of each.
    """

    phases = (START, "rollout", "update", "weight_sync", "evaluation", "checkpoint", "export")
    # Seconds of a phase on two cores; a kill's moment is somewhere in them.
    _SECONDS = {
        "rollout": 0.6,
        "update": 0.2,
        "weight_sync": 0.5,
        "evaluation": 0.3,
        "checkpoint": 0.1,
        "export": 0.2,
    }

    def __init__(self, root: Path, server: RunningServer | None, num_steps: int = 5, **rollout: Any) -> None:
        self.root, self.server, self.num_steps, self.rollout = write_inputs(root), server, num_steps, rollout
        self.victims: Sequence[Victim] = ("rank 0", "rank 1", "controller", "file", "writer", "asked 0", "asked 1")
        if server is None:
            self.victims = ("server", "controller", "server", "rank 0")
        self._seconds = self._SECONDS | {START: 6.0 if server else 30.0}
        self.repeated: list[int] = []
        self._told: dict[int, dict[str, Any]] = {}

    def live_through(self, name: str, kills: Sequence[Kill]) -> list[Life]:
        """Do a run, compare what it does again with what it did, and count its draws."""
        self._told, self.repeated = {}, []
        config = self._config(name)
        file = self.root / f"{name}.yaml"
        file.write_text(dump_config(config))
        scale = Scale(seconds=self._seconds, file_events=120, bytes_written=3_000_000)
        lives = live_through(["train", str(file)], config.output_dir, RANKS, kills, scale, self._compare(config))
        steps = [line["step"] for line in read_lines(config.output_dir / "metrics.jsonl")]
        assert steps == list(range(self.num_steps + 1))
        journal = config.output_dir / "journal"
        entries = [read_journal(journal_path(journal, step)) for step in steps[1:]]
        check_every_draw_ends_once(entries, config.rollout)
        return lives

    def _config(self, name: str) -> RunConfig:
        model: dict[str, Any] = {}
        sglang = SglangConfig(server_arguments={"max_total_tokens": 4096, "max_running_requests": 32})
        if self.server is not None:
            key_file = self.root / "key"
            key_file.write_text(self.server.api_key)
            model = {"model": {"path": self.server.model, "dtype": "float32"}}
            sglang = SglangConfig(urls=(self.server.url,), api_key_file=str(key_file))
        return small_run(
            self.root,
            name,
            num_steps=self.num_steps,
            data=prompts(self.root, held_out="held_out"),
            rollout={"engine": "sglang", "sglang": sglang} | self.rollout,
            checkpoint={"every_steps": 2, "keep_last": 1000, "export_dtype": "float32", "verify_export": False},
            evaluation={"num_prompts": 4, "every_steps": 2},
            **model,
        )

    def _compare(self, config: RunConfig) -> Callable[[int, Life], None]:
        path = config.output_dir / "metrics.jsonl"

        def compare(number: int, life: Life) -> None:
            lines = {line["step"]: trained(line) for line in without_times(read_lines(path))} if path.exists() else {}
            for step in (lines.keys() & self._told.keys()) - {0}:
                self.repeated.append(step)
                assert lines[step] == self._told[step], f"step {step} in life {number}"
            self._told |= lines

        return compare


def trained(line: dict[str, Any]) -> dict[str, Any]:
    """What a step's training gave; evaluation asks servers, which do not repeat themselves."""
    return {key: value for key, value in line.items() if not key.startswith(("eval/", "rollout/canary"))}


def pursue(subject: Subject, mode: str, count: int) -> int:
    """Disturb runs until so many kills have hit, those of the report included, which each run is added to.

    Args:
        subject: The runs.
        mode: What they are called in the report.
        count: How many kills.

    Returns:
        How many have hit.
    """
    report = os.environ.get(REPORT_VARIABLE)
    known = read_lines(Path(report)) if report and Path(report).exists() else []
    hits = sum(kill["killed"] for run in known if run["mode"] == mode for kill in run["lives"])
    seed = 1 + max((run["seed"] for run in known if run["mode"] == mode), default=-1)
    while hits < count:
        lives = subject.live_through(f"{mode}{seed}", draw_kills(seed, KILLS_OF_A_RUN, subject.victims, subject.phases))
        for life in lives:
            # Before the ranks have met, none can know of another's death.
            assert not life.left or (life.kill is not None and life.kill.phase == START), life
        hits += sum(life.killed for life in lives)
        if report:
            told = {"mode": mode, "seed": seed, "lives": [asdict(life) for life in lives if life.kill is not None]}
            with Path(report).open("a") as file:
                file.write(json.dumps(told) + "\n")
        seed += 1
    return hits


def wanted(share: float, without_report: int) -> int:
    """How many kills are asked for: a share of the campaign's, or a few where there is none."""
    total = os.environ.get(COUNT_VARIABLE)
    return round(int(total) * share) if total else without_report
