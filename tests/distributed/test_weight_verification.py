"""Servers that have the actor's weights pass; those that have others, or say so, are named."""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.weight_sync.canary import Canary, canary_token_ids
from megatron_fipo.weight_sync.distributed import DistributedTransport
from megatron_fipo.weight_sync.server_calls import ServerCalls
from megatron_fipo.weight_sync.verification import WeightVerification
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import tiny_actor
from tests.tiny_models import EOS_TOKEN_ID, write_tiny_model
from tests.weight_servers import stand_ins

pytestmark = pytest.mark.distributed

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP 2": (2, TP),
    "CP 2": (2, {"context_parallel_size": 2}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
    "VPP 2, DP 2": (4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("verification") / "qwen2", "qwen2")


def push_and_check(
    folder: Path,
    parallelism: dict[str, Any],
    servers: list[ServerAddress],
    pushes: int = 1,
    settings: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Push as version 0, 1, …, and check after each."""
    config = WeightSyncConfig(timeout_s=60.0, **(settings or {}))
    reports = []
    # The run samples at another temperature than the canary's.
    with tiny_actor(folder, parallelism) as actor:
        actor.forward.temperature = 0.7
        calls = ServerCalls(None)
        token_ids = canary_token_ids(actor.bridge.vocab_size, {EOS_TOKEN_ID}, longest=48)
        canary = Canary(token_ids, actor.forward, packing_rules(actor.parallelism), actor.context)
        verification = WeightVerification(canary, config, "float32", calls)
        transport = DistributedTransport(actor.bridge, unwrap(actor.chunks), actor.context, config, calls)
        for version in range(pushes):
            verification.expect()
            transport.push(version, servers)
            report = verification.check(version, servers)
            reports.append({name: getattr(report, name) for name in report.__slots__})
        assert actor.forward.temperature == 0.7
        transport.close()
        calls.close()
    return reports


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_server_with_the_actors_weights_passes(folder, layout):
    world_size, parallelism = LAYOUTS[layout]
    with stand_ins({}, model=folder) as servers:
        ranks = run_distributed(push_and_check, world_size, folder, parallelism, [server.address for server in servers])
    for (report,) in ranks:
        assert report["failed"] == {}
        assert 0.0 < report["mean_difference"] <= report["max_difference"] < 1e-4
        assert report["seconds"] > 0.0 and not report["checksums_compared"]


def test_servers_with_other_weights_are_named(folder):
    # One has an element that is wrong, one says that it has an older version, one is gone.
    with stand_ins({}, {}, {"spoil": 3}, {"version": 5}, model=folder) as servers:
        gone = ServerAddress(name="gone", url="http://127.0.0.1:9", tensor_parallel_size=1, policy_version=-1)
        addresses = [*(server.address for server in servers), gone]
        ((report,),) = run_distributed(push_and_check, 1, folder, {}, addresses)
    assert sorted(report["failed"]) == ["gone", "server-2", "server-3"]
    assert "differ from the actor's by" in report["failed"]["server-2"]
    assert "weight_sync.canary_tolerance is 0.0001" in report["failed"]["server-2"]
    assert "versions [5], not all of 0" in report["failed"]["server-3"]
    assert "127.0.0.1:9" in report["failed"]["gone"]
    assert report["max_difference"] > 1e-4


def test_a_difference_below_the_canarys_tolerance_is_found_by_checksums(folder):
    with stand_ins({}, {}, {"spoil": 3}, model=folder) as servers:
        addresses = [server.address for server in servers]
        ((report,),) = run_distributed(push_and_check, 1, folder, {}, addresses, 1, {"canary_tolerance": 100.0})
    assert report["failed"] == {"server-2": "its parameters are not those of the other servers, bit by bit"}
    assert report["checksums_compared"]


def test_two_servers_that_differ_both_fail(folder):
    with stand_ins({}, {"spoil": 3}, model=folder) as servers:
        addresses = [server.address for server in servers]
        ((report,),) = run_distributed(push_and_check, 1, folder, {}, addresses, 1, {"canary_tolerance": 100.0})
    assert sorted(report["failed"]) == ["server-0", "server-1"]


@pytest.mark.parametrize(
    ("every", "compared"), [(3, [True, False, False, True]), (0, [False] * 4)], ids=["every third", "never"]
)
def test_checksums_are_compared_at_first_and_then_now_and_again(folder, every, compared):
    with stand_ins({}, {}, model=folder) as servers:
        addresses = [server.address for server in servers]
        (reports,) = run_distributed(push_and_check, 1, folder, {}, addresses, 4, {"checksum_every": every})
    assert [report["checksums_compared"] for report in reports] == compared
    assert all(report["failed"] == {} for report in reports)


def test_without_verification_no_server_is_asked(folder):
    with stand_ins({}, model=folder) as servers:
        ((report,),) = run_distributed(push_and_check, 1, folder, {}, [servers[0].address], 1, {"verify": False})
        assert "continue" not in servers[0].told()["calls"]
    assert report["seconds"] == 0.0
