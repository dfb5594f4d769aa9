import re

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.launch.slurm import RENDEZVOUS_PORTS, rank_variables, rendezvous_port

# What srun gives the last of four tasks on two nodes.
TASK = {
    "SLURM_JOB_ID": "310090",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    # The job may be larger than the step.
    "SLURM_NTASKS": "16",
    "SLURM_JOB_NODELIST": "node[01-16]",
}
# What torchrun gives a rank, on top of what srun gave torchrun.
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "16", "RANK": "9"}


def test_a_task_becomes_a_rank() -> None:
    assert rank_variables(TASK) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": str(rendezvous_port(310090, 1)),
    }


def test_ranks_of_a_step_are_numbered_node_by_node_and_meet_in_one_place() -> None:
    ranks = []
    for node in range(2):
        for task in range(2):
            numbers = {"SLURM_NODEID": node, "SLURM_LOCALID": task, "SLURM_PROCID": 2 * node + task}
            ranks.append(rank_variables(TASK | {key: str(number) for key, number in numbers.items()}))
    assert [each["RANK"] for each in ranks] == ["0", "1", "2", "3"]
    assert [each["LOCAL_RANK"] for each in ranks] == ["0", "1", "0", "1"]
    assert len({(each["MASTER_ADDR"], each["MASTER_PORT"], each["WORLD_SIZE"]) for each in ranks}) == 1


def test_one_task_on_each_node_is_in_order_however_they_are_dealt() -> None:
    task = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert rank_variables(task | {"SLURM_DISTRIBUTION": "cyclic"})["RANK"] == "1"


def test_a_given_meeting_place_is_kept() -> None:
    variables = rank_variables(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "7011"})
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.7", "7011")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # In the shell that salloc opens.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
        # In a batch script of one task, or a step of one.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        # Started by torchrun: alone, from a batch script, one on each of two nodes.
        TORCHRUN,
        {**TORCHRUN, "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "GROUP_WORLD_SIZE": "1"},
        {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "GROUP_WORLD_SIZE": "2"},
        # By hand, over srun.
        {**TASK, "RANK": "3", "WORLD_SIZE": "4"},
    ],
)
def test_nothing_is_added_where_nothing_is_missing(environment: dict[str, str]) -> None:
    assert rank_variables(environment) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE = 2: heterogeneous jobs are not supported; submit a job with one"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS = 3: must be the same number of tasks on each of the 2"),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, "SLURM_PROCID = 1: tasks must be numbered node by node"),
        # Two of the four tasks are in place under this distribution too.
        ({"SLURM_DISTRIBUTION": "cyclic:block"}, "SLURM_PROCID = 3: tasks must be numbered node by node (SLURM_DISTR"),
        ({"SLURM_STEP_NODELIST": "node[1-3]"}, "SLURM_STEP_NODELIST = node[1-3]: names 3 hosts, and SLURM_STEP_NUM"),
        ({"SLURM_STEP_NODELIST": "node[1-"}, "SLURM_STEP_NODELIST = node[1-: must be a host list such as"),
        ({"SLURM_LOCALID": "one"}, "SLURM_LOCALID = one: must be a whole number; leave the variable as Slurm sets it"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID = -1: must be a whole number"),
    ],
)
def test_a_step_that_makes_no_world_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        rank_variables(TASK | changes)


@pytest.mark.parametrize("name", [name for name in TASK if name not in ("SLURM_NTASKS", "SLURM_JOB_NODELIST")])
def test_a_variable_that_does_not_reach_the_task_is_named(name: str) -> None:
    environment = {key: value for key, value in TASK.items() if key != name}
    if name == "SLURM_STEP_NUM_TASKS":
        # It tells a task from the batch script; without it this looks like one of those.
        name = "SLURM_NTASKS"
    with pytest.raises(ConfigError, match=f"^{name} = "):
        rank_variables(environment)


def test_a_batch_script_of_several_tasks_needs_srun() -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    with pytest.raises(ConfigError, match="SLURM_NTASKS = 16: the job has several tasks, .*; put srun in front"):
        rank_variables(environment)


@pytest.mark.parametrize(
    ("tasks", "nodes", "together"),
    [
        # One on each node, but each with --nnodes 1.
        ("2", "2", "1"),
        # One for each GPU.
        ("16", "2", "16"),
        ("16", "2", "2"),
        ("8", "1", "1"),
    ],
)
def test_torchruns_that_get_into_each_others_way_are_refused(tasks: str, nodes: str, together: str) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": nodes, "GROUP_WORLD_SIZE": together}
    with pytest.raises(ConfigError, match=f"SLURM_STEP_NUM_TASKS = {tasks}: each task started a torchrun, on {nodes} "):
        rank_variables(TORCHRUN | slurm)


def test_jobs_with_near_ids_meet_at_different_ports() -> None:
    ports = [rendezvous_port(job_id, 0) for job_id in range(123_456, 123_456 + 800)]
    assert len(set(ports)) == 800
    assert set(ports) <= set(RENDEZVOUS_PORTS)
    # The step of a shell that salloc opened has a huge number.
    assert rendezvous_port(7, 4_294_967_290) in RENDEZVOUS_PORTS


def test_ports_are_clear_of_outgoing_connections_and_of_slurm() -> None:
    assert min(RENDEZVOUS_PORTS) > 6819
    assert max(RENDEZVOUS_PORTS) < 9000
