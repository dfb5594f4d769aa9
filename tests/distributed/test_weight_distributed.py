"""Broadcasts of weights into stand-in servers: every layout, and servers that fail in the middle."""

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.actor.model import unwrap
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.weight_sync.distributed import DistributedTransport
from megatron_fipo.weight_sync.server_calls import ServerCalls
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import folder_tensors, tiny_actor
from tests.tiny_models import write_tiny_model
from tests.weight_servers import digest, stand_ins

pytestmark = pytest.mark.distributed

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one rank": ("qwen2", 1, {}),
    "PP 2": ("qwen2", 2, PP),
    "TP 2 × PP 2": ("qwen2", 4, TP | PP),
    "PP 2 × EP 2": ("qwen3_moe", 4, PP | EP),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    # Wide enough that the smallest bucket, 1 MiB, holds a part of it.
    write_tiny_model(root / "qwen2", "qwen2", hidden_size=128, intermediate_size=384)
    write_tiny_model(root / "qwen3_moe", "qwen3_moe", hidden_size=128, moe_intermediate_size=192)
    return root


def push(
    folder: Path, parallelism: dict[str, Any], pushes: list[list[ServerAddress]], timeout_s: float = 60.0
) -> list[dict[str, Any]]:
    """Push as version 7, 8, … to the servers given; what each push told and took."""
    config = WeightSyncConfig(bucket_mib=1, timeout_s=timeout_s)
    reports = []
    with tiny_actor(folder, parallelism) as actor:
        calls = ServerCalls(None)
        transport = DistributedTransport(actor.bridge, unwrap(actor.chunks), actor.context, config, calls)
        for version, servers in enumerate(pushes, start=7):
            began = time.monotonic()
            report = transport.push(version, servers)
            reports.append(
                {"bytes": report.num_bytes, "failed": dict(report.failed), "seconds": time.monotonic() - began}
            )
        transport.close()
        calls.close()
    return reports


def expected(folder: Path) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in folder_tensors(folder).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_server_gets_every_tensor(root, layout):
    model, world_size, parallelism = LAYOUTS[layout]
    with stand_ins({}, {}) as servers:
        addresses = [server.address for server in servers]
        ranks = run_distributed(push, world_size, root / model, parallelism, [addresses, addresses])
        told = [server.told() for server in servers]
    num_bytes = sum(tensor.nbytes for tensor in folder_tensors(root / model).values())
    for rank in ranks:
        assert [(each["bytes"], each["failed"]) for each in rank] == [(num_bytes, {})] * 2
    for each in told:
        assert each["tensors"] == expected(root / model)
        assert (each["version"], each["in_update"]) == ("8", False)
        kinds = [call.split()[0] for call in each["calls"]]
        assert kinds[0] == "begin" and kinds[-3:] == ["end", "flush", "version"]
        assert kinds.count("update") > 2 * parallelism.get("pipeline_model_parallel_size", 1)
        # Groups are made once: the servers stayed the same.
        assert kinds.count("init") == parallelism.get("pipeline_model_parallel_size", 1)


@pytest.mark.parametrize(("fault", "at"), [("die", 0), ("die", 2), ("refuse", 2), ("hang", 1)])
def test_a_server_that_fails_is_left_out(root, fault, at):
    with stand_ins({}, {fault: at}) as servers:
        addresses = [server.address for server in servers]
        ranks = run_distributed(push, 2, root / "qwen2", PP, [addresses, addresses[:1]], 8.0)
        told = servers[0].told()
    for first, second in ranks:
        assert list(first["failed"]) == ["server-1"] and second["failed"] == {}
        assert "update_weights_from_distributed" in first["failed"]["server-1"]
        assert first["seconds"] < 8.0 + 30.0
    assert ranks[0][0]["failed"] == ranks[1][0]["failed"]
    assert told["tensors"] == expected(root / "qwen2")
    assert (told["version"], told["in_update"]) == ("8", False)
    assert len(told["groups"]) == 2, "the group with the other server is left"


def test_servers_that_stay_keep_no_group_of_earlier_pushes(root):
    with stand_ins({}, {}) as servers:
        addresses = [server.address for server in servers]
        # As after a restart of the second one.
        run_distributed(push, 1, root / "qwen2", {}, [addresses, addresses[1:], addresses])
        told = [server.told() for server in servers]
    assert [len(each["groups"]) for each in told] == [1, 1]
    assert [each["version"] for each in told] == ["9", "9"]


def test_a_frozen_server_is_found_before_anything_is_sent(root):
    with stand_ins({}, {}) as servers:
        servers[1].stop()
        addresses = [server.address for server in servers]
        ((report,),) = run_distributed(push, 1, root / "qwen2", {}, [addresses], 3.0)
        told = servers[0].told()
    assert list(report["failed"]) == ["server-1"] and "begin_weight_update" in report["failed"]["server-1"]
    assert told["tensors"] == expected(root / "qwen2")
    assert told["calls"].count("init group") == 1


def test_the_run_goes_on_where_no_server_answers(root):
    gone = ServerAddress(name="gone", url="http://127.0.0.1:9", tensor_parallel_size=1, policy_version=3)
    ((report, empty),) = run_distributed(push, 1, root / "qwen2", {}, [[gone], []])
    assert list(report["failed"]) == ["gone"] and "127.0.0.1:9" in report["failed"]["gone"]
    assert empty["failed"] == {}
