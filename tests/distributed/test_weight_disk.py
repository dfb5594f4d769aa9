"""Weights through files: whole folders alone, the old ones removed, and what a full or closed disk says."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.actor.model import unwrap
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.hf_folder import check_weights
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.weight_sync.disk import DiskTransport
from megatron_fipo.weight_sync.server_calls import ServerCalls
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import folder_tensors, tiny_actor
from tests.tiny_models import write_tiny_model
from tests.weight_servers import digest, stand_ins

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one rank": ("qwen2", 1, {}),
    "PP 2": ("qwen2", 2, {"pipeline_model_parallel_size": 2}),
    "TP 2 × EP 2": ("qwen3_moe", 4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    write_tiny_model(root / "qwen2", "qwen2", hidden_size=128, intermediate_size=384)
    write_tiny_model(root / "qwen3_moe", "qwen3_moe", hidden_size=128, moe_intermediate_size=192)
    return root


def push(
    model: Path,
    parallelism: dict[str, Any],
    folder: Path,
    servers: list[ServerAddress],
    largest_file: int | None = None,
) -> list[tuple[int, dict[str, str]] | str]:
    """Push as versions 3 and 4: bytes and failures of each, or the error."""
    if largest_file is not None:
        # As on a full disk, writing fails instead of ending the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    outcomes: list[tuple[int, dict[str, str]] | str] = []
    with tiny_actor(model, parallelism | {"sequence_parallel": "tensor_model_parallel_size" in parallelism}) as actor:
        calls = ServerCalls(None)
        config = WeightSyncConfig(bucket_mib=1, timeout_s=60)
        transport = DiskTransport(actor.bridge, unwrap(actor.chunks), actor.context, folder, config, calls)
        for version in (3, 4):
            try:
                report = transport.push(version, servers)
                outcomes.append((report.num_bytes, dict(report.failed)))
            except RunError as error:
                outcomes.append(str(error))
        calls.close()
    return outcomes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_servers_read_whole_folders(root, tmp_path, layout):
    model, world_size, parallelism = LAYOUTS[layout]
    with stand_ins({}, {}) as servers:
        addresses = [server.address for server in servers]
        ranks = run_distributed(push, world_size, root / model, parallelism, tmp_path / "weights", addresses)
        told = [server.told() for server in servers]
    tensors = folder_tensors(root / model)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert ranks == [[(size, {}), (size, {})]] * world_size
    for each in told:
        assert each["tensors"] == {name: digest(tensor) for name, tensor in tensors.items()}
        folders = [f"disk {tmp_path}/weights/version_{version}" for version in (3, 4)]
        assert each["calls"] == [folders[0], "flush", "version", folders[1], "flush", "version"]
        assert each["version"] == "4"
    assert os.listdir(tmp_path / "weights") == ["version_4"]
    assert check_weights(tmp_path / "weights" / "version_4") == {name: [*t.shape] for name, t in tensors.items()}
    config = json.loads((tmp_path / "weights" / "version_4" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_the_old_version_stays_until_a_server_has_the_new_one(root, tmp_path):
    gone = ServerAddress(name="gone", url="http://127.0.0.1:9", tensor_parallel_size=1, policy_version=3)
    ((first, second),) = run_distributed(push, 1, root / "qwen2", {}, tmp_path, [gone])
    assert list(first[1]) == list(second[1]) == ["gone"]
    assert sorted(os.listdir(tmp_path)) == ["version_3", "version_4"]


def test_a_full_disk_is_named_on_every_rank(root, tmp_path):
    parallelism = {"pipeline_model_parallel_size": 2}
    ranks = run_distributed(push, 2, root / "qwen2", parallelism, tmp_path / "weights", [], 200_000)
    for problem in (outcome for rank in ranks for outcome in rank):
        assert problem.startswith(f"weight_sync.folder = {tmp_path}/weights: cannot hold the weights (")
        assert "File too large" in problem and "free space there" in problem
    assert not [name for name in os.listdir(tmp_path / "weights") if not name.endswith(".partial")]


def test_a_place_that_cannot_be_written_to_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    ((first, _),) = run_distributed(push, 1, root / "qwen2", {}, tmp_path / "file" / "weights", [])
    assert first.startswith(f"weight_sync.folder = {tmp_path}/file/weights: cannot hold the weights (")
    assert "Not a directory" in first
