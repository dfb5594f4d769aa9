"""What slurm/train_sglang.sbatch refuses on a real Slurm before it starts anything."""

import sys
from pathlib import Path

import pytest

from megatron_fipo.config.load import dump_config
from tests.cluster.mini_slurm import Job, MiniSlurm
from tests.integration.small_runs import small_run, write_inputs

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "train_sglang.sbatch"
VARIABLES = {"MEGATRON_FIPO_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
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
