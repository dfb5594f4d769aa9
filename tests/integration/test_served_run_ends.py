"""How runs with servers end early: with one error on every rank, and nothing left running.

A stand-in takes SGLang's place here; it never generates.
"""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.trainer import build
from megatron_fipo.trainer.state import Run
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import prompts, run_to_its_end, small_run, write_inputs
from tests.marked_processes import left_after, mark_own_children

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]

STAND_IN = Path(__file__).parents[1] / "stand_in_sglang"
PATIENCE_S = 60.0

type End = tuple[tuple[str, ...], list[str]]
"""How a run ended on a rank, and the processes that it left behind."""


def served_run(root: Path, name: str, **changes: Any) -> RunConfig:
    rollout = {"engine": "sglang", "sglang": SglangConfig(max_restarts=0)}
    return small_run(root, name, rollout=rollout, **changes)


def kill_controller(run: Run) -> None:
    link = run.rollout.calls.link  # type: ignore[union-attr]
    if link is not None:
        link.process.kill()


def run_one(root: Path, name: str, variables: dict[str, str], changes: dict[str, Any], change: Any = None) -> End:
    os.environ.update(variables)
    mark_own_children(f"{root}/{name}")
    ended = run_to_its_end(served_run(root, name, **changes), change)
    for variable in variables:
        del os.environ[variable]
    return ended.error, left_after(f"{root}/{name}", PATIENCE_S)


def refuse_model(config: RunConfig, *_: Any) -> Any:
    """Takes the place of the actor's building: waits until a server has been started, and refuses the model."""
    deadline = time.monotonic() + PATIENCE_S
    while not list(RunDirectory(config.output_dir).servers.glob("server0.life1.log")):
        assert time.monotonic() < deadline, "no server is started before the actor is built"
        time.sleep(0.05)
    raise ConfigError("model.path", config.model.path, "is refused", "choose another")


def run_refused(root: Path, name: str) -> End:
    build_actor = build.build_actor
    build.build_actor = refuse_model
    end = run_one(root, name, {"STAND_IN_DELAY_S": "600"}, {})
    build.build_actor = build_actor
    return end


def on_gpus(root: Path) -> dict[str, str]:
    """What makes the agent find GPUs on a node with two of the trainer's ranks; it starts servers as for real ones."""
    return {"LD_LIBRARY_PATH": str(root), "LOCAL_WORLD_SIZE": "2"}


def write_driver(folder: Path) -> None:
    """A library in the place of the GPU's driver, which counts eight GPUs."""
    source = "int cuInit(unsigned flags) { return 0; } int cuDeviceGetCount(int *count) { *count = 8; return 0; }"
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(compiler, input=source.encode(), check=True)


def run_all(root: Path) -> dict[str, End]:
    quiet_upstream()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
    absent = {"data": prompts(root, train="absent")}
    runs: dict[str, Callable[[str], End]] = {
        "bad_data": lambda name: run_one(root, name, {}, absent),
        "dead_servers": lambda name: run_one(root, name, {"STAND_IN_FAILS": "1", **on_gpus(root)}, {}),
        "refused_model": lambda name: run_refused(root, name),
        "dead_controller": lambda name: run_one(root, name, {"STAND_IN_DELAY_S": "600"}, {}, kill_controller),
    }
    return {name: run(name) for name, run in runs.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("ends"))
    write_driver(folder)
    return folder


@pytest.fixture(scope="module")
def ends(root: Path) -> list[dict[str, End]]:
    return run_distributed(run_all, 2, root, timeout_s=900.0)


@pytest.mark.parametrize(
    ("name", "kind", "texts"),
    [
        ("bad_data", "ConfigError", ["data.train.path = ", "must be a readable file"]),
        ("dead_servers", "RunError", ["no SGLang server is left", "no memory on GPU 2"]),
        ("refused_model", "ConfigError", ["model.path = ", "is refused; choose another"]),
        ("dead_controller", "ControllerEndedError", ["the rollout controller", "was killed by signal 9"]),
    ],
)
def test_every_rank_has_the_error_and_nothing_is_left(
    name: str, kind: str, texts: list[str], ends: list[dict[str, End]]
) -> None:
    for rank, of_rank in enumerate(ends):
        error, left = of_rank[name]
        assert error and error[0] == kind, f"rank {rank}: {error}"
        assert all(text in error[1] for text in texts), error[1]
        assert left == []


def test_refused_inputs_leave_no_directory_behind(root: Path, ends: list[dict[str, End]]) -> None:
    assert {path.name for path in root.iterdir() if path.is_dir()} == {"model", "dead_servers", "dead_controller"}
