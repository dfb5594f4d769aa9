"""Gives each task of a Slurm step the environment by which torch.distributed finds its rank and the other ranks."""

from collections.abc import Mapping

from megatron_fipo.config.base import ABSENT, ConfigError, require
from megatron_fipo.launch.hostlist import expand_hostlist

# Below the ports that kernels give to outgoing connections (from 32768 on; from 9000 on some GPU systems), clear of
# Slurm's own (6817 to 6819).
RENDEZVOUS_PORTS = range(7100, 7900)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Find out how this process was started, and what it still lacks to join the other ranks.

    Args:
        environment: The process's environment.

    Returns:
        Nothing under torchrun, which has set everything, and for a process alone. For one of several tasks that srun
        has started: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the last two
        are kept where they are given.

    Raises:
        ConfigError: Processes were started that do not know of each other, ranks are not in the order of the nodes,
            the job is heterogeneous, or Slurm's variables are incomplete.
    """
    if "WORLD_SIZE" in environment:
        _check_torchrun(environment)
        return {}
    if "SLURM_STEP_NUM_TASKS" not in environment:
        _check_started_by_srun(environment)
        return {}
    require(
        "SLURM_HET_SIZE" not in environment,
        field="SLURM_HET_SIZE",
        value=environment.get("SLURM_HET_SIZE"),
        rule="heterogeneous jobs are not supported",
        way_out="submit a job with one component (no `#SBATCH hetjob`, no `:` on the command line)",
    )
    if _number(environment, "SLURM_STEP_NUM_TASKS") == 1:
        return {}
    return _variables_of_task(environment)


def rendezvous_port(job_id: int, step_id: int) -> int:
    """Port on which the ranks of a step meet: the same for all of them, different for jobs with near ids."""
    return RENDEZVOUS_PORTS[(job_id * 7 + step_id) % len(RENDEZVOUS_PORTS)]


def _variables_of_task(environment: Mapping[str, str]) -> dict[str, str]:
    rank = _number(environment, "SLURM_PROCID")
    local_rank = _number(environment, "SLURM_LOCALID")
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
    num_nodes = _number(environment, "SLURM_STEP_NUM_NODES")
    hosts = expand_hostlist(_text(environment, "SLURM_STEP_NODELIST"))
    require(
        len(hosts) == num_nodes,
        field="SLURM_STEP_NODELIST",
        value=environment["SLURM_STEP_NODELIST"],
        rule=f"names {len(hosts)} hosts, and SLURM_STEP_NUM_NODES is {num_nodes}",
        way_out="leave both variables as Slurm sets them",
    )
    require(
        world_size % num_nodes == 0,
        field="SLURM_STEP_NUM_TASKS",
        value=world_size,
        rule=f"must be the same number of tasks on each of the {num_nodes} nodes",
        way_out="ask for --nodes and --ntasks-per-node, and leave --ntasks away",
    )
    local_world_size = world_size // num_nodes
    _check_order(environment, rank, local_rank, local_world_size)
    port = rendezvous_port(_number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID"))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": environment.get("MASTER_ADDR", hosts[0]),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def _check_order(environment: Mapping[str, str], rank: int, local_rank: int, local_world_size: int) -> None:
    """Refuse ranks that alternate between nodes: neighbours share tensors, so they belong on one node."""
    distribution = environment.get("SLURM_DISTRIBUTION", "")
    expected = _number(environment, "SLURM_NODEID") * local_world_size + local_rank
    # Some ranks are where they belong even so; those must not wait for the others.
    cyclic = distribution.startswith("cyclic") and environment["SLURM_STEP_NUM_NODES"] != "1" and local_world_size > 1
    require(
        rank == expected and not cyclic,
        field="SLURM_PROCID",
        value=rank,
        rule=f"tasks must be numbered node by node (SLURM_DISTRIBUTION is {distribution or 'not set'})",
        way_out="start the tasks with srun --distribution=block and --ntasks-per-node",
    )


def _check_torchrun(environment: Mapping[str, str]) -> None:
    """Refuse several torchruns that do not know of each other, or that share a node's devices."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "TORCHELASTIC_RUN_ID" not in environment or tasks == "1":
        return
    together = environment.get("GROUP_WORLD_SIZE")
    require(
        tasks == together == environment.get("SLURM_STEP_NUM_NODES"),
        field="SLURM_STEP_NUM_TASKS",
        value=tasks,
        rule=(
            f"each task started a torchrun, on {environment.get('SLURM_STEP_NUM_NODES')} nodes, and "
            f"{together} of them work together"
        ),
        way_out="start one torchrun on each node (srun --ntasks-per-node=1) with --nnodes, or tasks without torchrun",
    )


def _check_started_by_srun(environment: Mapping[str, str]) -> None:
    """Refuse to be the only process of a batch job that asked for several tasks."""
    tasks = environment.get("SLURM_NTASKS", "1")
    require(
        tasks == "1" or "SLURM_PROCID" not in environment,
        field="SLURM_NTASKS",
        value=tasks,
        rule="the job has several tasks, and this process was started once, by the batch script itself",
        way_out="put srun in front of the command, as slurm/train.sbatch does (srun --ntasks=1 for a single rank)",
    )


def _text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise ConfigError(
            field=name,
            value=ABSENT,
            rule="Slurm sets it for each task, and it is not there",
            way_out="let Slurm's variables through to the task (srun --export=ALL, or the container's settings)",
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    require(
        text.isdecimal(),
        field=name,
        value=text,
        rule="must be a whole number",
        way_out="leave the variable as Slurm sets it",
    )
    return int(text)
