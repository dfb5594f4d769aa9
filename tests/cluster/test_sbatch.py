"""Runs that slurm/train.sbatch starts on a real Slurm."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from megatron_fipo.config.load import dump_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.launch.hostlist import expand_hostlist
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from tests.cluster.mini_slurm import Job, MiniSlurm, wait_for
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import read_lines, run_in_turn, small_run, without_times, write_inputs

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "train.sbatch"
# What a site's own settings would be: where Python is, and that ranks talk over loopback.
VARIABLES = {
    "MEGATRON_FIPO_VENV": sys.prefix,
    "PYTHONPATH": str(REPOSITORY),
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}
LAYOUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}
# The script asks for nodes with eight GPUs.
TWO_PER_NODE = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
ONE_PER_NODE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("sbatch"))


def submit(
    slurm: MiniSlurm,
    config: RunConfig,
    *words: str,
    options: list[str] = TWO_PER_NODE,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Submit the script from the folder above the run directory."""
    path = config.output_dir.with_suffix(".yaml")
    path.write_text(dump_config(config))
    return slurm.submit(*options, SCRIPT, path, *words, cwd=path.parent, variables=VARIABLES | dict(variables or {}))


def logs(root: Path, job_id: int) -> tuple[str, str]:
    """Text of the job's own log and of its ranks'."""
    job_log = root / f"megatron-fipo-{job_id}.log"
    ranks_log = root / "logs" / f"megatron-fipo-{job_id}" / "attempt_0.log"
    return job_log.read_text(), ranks_log.read_text()


def test_a_job_gives_the_metrics_of_a_local_run(slurm: MiniSlurm, root: Path) -> None:
    changes = {"parallelism": LAYOUT, "num_steps": 2}
    job_id = submit(slurm, small_run(root, "job", **changes))
    local = small_run(root, "local", **changes)
    for ends in run_distributed(run_in_turn, 4, [local]):
        assert ends[0].error == ()
    ended = slurm.wait(job_id)
    job_log, ranks_log = logs(root, job_id)
    assert ended == Job(state="COMPLETED", exit_code=0), job_log + ranks_log
    here, there = (without_times(read_lines(root / name / "metrics.jsonl")) for name in ("local", "job"))
    assert [line["step"] for line in there] == [0, 1, 2]
    assert there == here
    exports = [(root / name / "export" / "model.safetensors").read_bytes() for name in ("local", "job")]
    assert exports[0] == exports[1]
    assert f"attempt 0 on {expand_and_join(slurm.nodes)}" in job_log
    assert "attempt 0 ended with 0" in job_log
    assert "0: " in ranks_log and "rank 0 INFO step 2/2" in ranks_log


def expand_and_join(nodes: list[str]) -> str:
    """Two nodes as Slurm writes them."""
    return f"{nodes[0][:-1]}[1-2]"


def test_a_bad_configuration_ends_the_job_with_its_message(slurm: MiniSlurm, root: Path) -> None:
    job_id = submit(slurm, small_run(root, "bad"), "--parallelism.tensor_model_parallel_size", "3")
    assert slurm.wait(job_id) == Job(state="FAILED", exit_code=2)
    job_log = (root / f"megatron-fipo-{job_id}.log").read_text()
    message = "megatron-fipo: parallelism = tensor 3 × context 1 × pipeline 1 = 3: must divide the world: world size 4"
    assert job_log.startswith(message)
    assert job_log.count("megatron-fipo: ") == 1
    # No rank was started.
    assert not (root / "logs" / f"megatron-fipo-{job_id}").exists()
    assert not (root / "bad").exists()


def test_a_run_that_stops_ends_the_job_with_its_message(slurm: MiniSlurm, root: Path) -> None:
    """Whichever rank is the first to leave: srun then ends the others, and rank 0 is the one that speaks."""
    folder = root / "damaged"
    folder.mkdir()
    (folder / "rollout_000001.npz").write_bytes(b"PK damaged")
    config = small_run(root, "stopped", mode="train_only", recorded_rollouts=folder, data=None)
    job_id = submit(slurm, config, options=ONE_PER_NODE)
    ended = slurm.wait(job_id)
    job_log, ranks_log = logs(root, job_id)
    assert ended == Job(state="FAILED", exit_code=1), job_log
    message = f"0: megatron-fipo: the run stopped: {folder}/rollout_000001.npz: cannot be read as a recorded rollout"
    assert ranks_log.count(message) == ranks_log.count("megatron-fipo: ") == 1
    # The end of the ranks' log is in the job's, which is where one looks first.
    assert job_log.count(message) == 1
    assert "attempt 0 ended with 1" in job_log


def test_a_killed_rank_ends_the_job(slurm: MiniSlurm, root: Path) -> None:
    config = small_run(root, "killed", num_steps=100_000)
    job_id = submit(slurm, config, options=ONE_PER_NODE, variables={"MEGATRON_FIPO_MAX_RESTARTS": "0"})
    wait_for_step(config, 1)
    os.kill(process_of_rank(job_id, rank=1), signal.SIGKILL)
    ended = slurm.wait(job_id)
    job_log, log = logs(root, job_id)
    assert ended == Job(state="FAILED", exit_code=85), job_log + log
    died = r"^0: megatron-fipo: the run stopped: rank 1 \(.*\) died without a word; the same command goes on$"
    assert re.search(died, log, re.MULTILINE)
    assert "Traceback" not in log
    assert slurm.command("squeue", "-h") == ""


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_job_is_queued_again_until_the_run_is_done(slurm: MiniSlurm, root: Path) -> None:
    """Once since it was asked to end, as before its time limit, and once since a rank was killed."""
    config = small_run(root, "again", num_steps=60, checkpoint={"every_steps": 1, "export_at_end": False})
    job_id = submit(slurm, config, options=ONE_PER_NODE)
    wait_for_step(config, 3)
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    wait_for(lambda: slurm.show_job(job_id)["Restarts"] == "1", "the job to be queued again", 120.0)
    stopped_at = last_step(config)
    wait_for_step(config, stopped_at + 3)
    os.kill(process_of_rank(job_id, rank=1), signal.SIGKILL)
    ended = slurm.wait(job_id)
    job_log, _ = logs(root, job_id)
    told = job_log + "".join(ranks_log(root, job_id, attempt) for attempt in range(3))
    assert ended == Job(state="COMPLETED", exit_code=0), told
    assert slurm.show_job(job_id)["Restarts"] == "2"
    assert [line["step"] for line in read_lines(config.output_dir / "metrics.jsonl")] == list(range(61))
    for attempt, line in enumerate(("the run ended on SIGUSR1; the same command goes on", "the run stopped: rank 1 (")):
        assert ranks_log(root, job_id, attempt).count(f"0: megatron-fipo: {line}") == 1, told
        assert f"attempt {attempt} ended with 85" in job_log
    assert "died without a word" in ranks_log(root, job_id, 1)
    assert "attempt 2 ended with 0" in job_log
    assert job_log.count("the job is queued again") == 2
    assert slurm.command("squeue", "-h") == ""


@pytest.mark.exhaustive
def test_a_cancelled_job_is_saved_and_stays_cancelled(slurm: MiniSlurm, root: Path) -> None:
    config = small_run(root, "cancelled", num_steps=100_000, checkpoint={"every_steps": 100_000})
    job_id = submit(slurm, config, options=ONE_PER_NODE)
    wait_for_step(config, 1)
    slurm.command("scancel", job_id)
    ended = slurm.wait(job_id)
    job_log, _ = logs(root, job_id)
    assert ended.state == "CANCELLED"
    assert slurm.show_job(job_id)["Restarts"] == "0"
    assert len(CheckpointStore(config.output_dir / "checkpoints").steps()) == 1, job_log + ranks_log(root, job_id, 0)


def last_step(config: RunConfig) -> int:
    path = config.output_dir / "metrics.jsonl"
    return max((line["step"] for line in read_lines(path)), default=-1) if path.exists() else -1


def wait_for_step(config: RunConfig, step: int) -> None:
    wait_for(lambda: last_step(config) >= step, f"step {step}", 480.0)


def ranks_log(root: Path, job_id: int, attempt: int) -> str:
    path = root / "logs" / f"megatron-fipo-{job_id}" / f"attempt_{attempt}.log"
    return path.read_text() if path.exists() else ""


def process_of_rank(job_id: int, rank: int) -> int:
    """Process id of a rank of the job."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "megatron_fipo.cli" in process.cmdline()[:3] and process.environ().get("SLURM_JOB_ID") == str(job_id):
                if process.environ().get("SLURM_PROCID") == str(rank):
                    return process.pid
    raise AssertionError(f"job {job_id} has no rank {rank}")


@pytest.mark.parametrize(
    "text",
    ["a", "a,b", "node[1-3]", "n[1,3-4,08-11],login", "rack[1-2]node[01-02]", "gpu[9-11],gpu-b", "127.0.1.[1-2]"],
)
def test_host_lists_mean_what_slurm_says(slurm: MiniSlurm, text: str) -> None:
    assert expand_hostlist(text) == slurm.command("scontrol", "show", "hostnames", text).split()
