"""slurm/train_sglang.sbatch on a real Slurm: what it refuses before it starts anything, and runs from end to end."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config.load import dump_config
from megatron_fipo.config.sglang import SglangConfig
from tests.cluster.mini_slurm import Job, MiniSlurm
from tests.integration.small_runs import read_lines, small_run, write_inputs
from tests.sglang_servers import needs_sglang

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "train_sglang.sbatch"
VARIABLES = {"MEGATRON_FIPO_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
STAND_IN = REPOSITORY / "tests" / "stand_in_sglang"
TWO_PER_NODE = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("sglang_sbatch"))


def job_log(slurm: MiniSlurm, root: Path, *words: str, rollout_nodes: int) -> str:
    """What a job that is refused says."""
    path = root / "served.yaml"
    path.write_text(dump_config(small_run(root, "served")))
    variables = VARIABLES | {"ROLLOUT_NODES": str(rollout_nodes)}
    job_id = slurm.submit(*TWO_PER_NODE, SCRIPT, path, *words, cwd=root, variables=variables)
    assert slurm.wait(job_id) == Job(state="FAILED", exit_code=2)
    assert not (root / "served").exists()
    return (root / f"megatron-fipo-{job_id}.log").read_text()


def test_a_job_needs_nodes_to_train_on(slurm: MiniSlurm, root: Path) -> None:
    said = job_log(slurm, root, rollout_nodes=2)
    assert said == "ROLLOUT_NODES = 2: must leave at least one of the job's 2 nodes for training\n"


def test_the_ranks_are_those_of_the_other_nodes(slurm: MiniSlurm, root: Path) -> None:
    said = job_log(slurm, root, "--parallelism.tensor_model_parallel_size", "4", rollout_nodes=1)
    assert said.startswith("megatron-fipo: parallelism = tensor 4 × context 1 × pipeline 1 = 4: must divide the world")
    assert "world size 2" in said


def test_arguments_for_servers_are_checked(slurm: MiniSlurm, root: Path) -> None:
    said = job_log(slurm, root, "--rollout.sglang.server_arguments", '{"tp_size": 2}', rollout_nodes=1)
    assert "tp_size = 2: is set by rollout.sglang.tensor_parallel_size; leave it away" in said


def run_job(
    slurm: MiniSlurm, root: Path, name: str, variables: dict[str, str], **changes: Any
) -> tuple[Job, dict[str, str], int]:
    """A job with one node of each kind: how it ended, its logs, its id."""
    config = small_run(root, name, **changes)
    path = root / f"{name}.yaml"
    path.write_text(dump_config(config))
    # Ranks talk over loopback.
    variables = VARIABLES | {"ROLLOUT_NODES": "1", "GLOO_SOCKET_IFNAME": "lo"} | variables
    job_id = slurm.submit(*TWO_PER_NODE, SCRIPT, path, cwd=root, variables=variables)
    ended = slurm.wait(job_id)
    folder = root / "logs" / f"megatron-fipo-{job_id}"
    files = {
        "job": root / f"megatron-fipo-{job_id}.log",
        "ranks": folder / "attempt_0.log",
        "agents": folder / "agents_0.log",
    }
    return ended, {kind: file.read_text() if file.exists() else "" for kind, file in files.items()}, job_id


def processes_of(job_id: int) -> list[str]:
    """Command lines of the processes that a job has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_JOB_ID={job_id}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [each for each in found if each]


@needs_sglang
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_job_trains_with_a_server_on_a_node_of_its_own(slurm: MiniSlurm, root: Path) -> None:
    small = SglangConfig(server_arguments={"max_total_tokens": 4096, "max_running_requests": 32})
    rollout = {"sglang": small}
    ended, logs, job_id = run_job(slurm, root, "side_by_side", {}, num_steps=2, rollout=rollout)
    told = "\n".join(logs.values())
    assert ended == Job(state="COMPLETED", exit_code=0), told
    lines = read_lines(root / "side_by_side" / "metrics.jsonl")
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["rollout/canary_mismatch_max"] <= 1e-4
        assert (line["perf/weight_sync_servers"], line["perf/weight_sync_servers_failed"]) == (1, 0)
    assert "attempt 0 ended with 0" in logs["job"]
    assert "rank 0 INFO step 2/2" in logs["ranks"]
    assert "the agent of rollout node 0 has registered" in logs["ranks"]
    assert "agent INFO server0.life1 runs as process group" in logs["agents"]
    # The agent has found the run's end by itself.
    assert "Terminated" not in logs["job"] + logs["agents"], told
    assert not list((root / "side_by_side" / "servers").glob("*.json"))
    assert processes_of(job_id) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_servers_that_die_end_the_job_with_one_message(slurm: MiniSlurm, root: Path) -> None:
    """A stand-in takes SGLang's place, and dies as soon as it is started."""
    failing = {"PYTHONPATH": os.pathsep.join([str(STAND_IN), str(REPOSITORY)]), "STAND_IN_FAILS": "1"}
    rollout = {"sglang": SglangConfig(max_restarts=0)}
    ended, logs, job_id = run_job(slurm, root, "dying", failing, rollout=rollout)
    told = "\n".join(logs.values())
    assert ended == Job(state="FAILED", exit_code=1), told
    message = "0: megatron-fipo: the run stopped: no SGLang server is left; server 0: "
    assert logs["ranks"].count(message) == logs["ranks"].count("megatron-fipo: ") == 1, told
    # The end of the ranks' log is in the job's, which is where one looks first.
    assert logs["job"].count(message) == 1
    assert "attempt 0 ended with 1" in logs["job"]
    assert processes_of(job_id) == []
