"""SGLang's launch arguments: checked against its own list, without importing it."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.servers.arguments import check_server_arguments
from megatron_fipo.rollout.servers.command import ServerPlace, server_command, server_environment
from megatron_fipo.rollout.servers.settings import server_settings

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
KEY_FILE = Path("/secret/key.yaml")


@needs_sglang
def test_arguments_of_sglang_pass_without_importing_it() -> None:
    check_server_arguments(
        {
            "mem_fraction_static": 0.8,
            "max-running-requests": 64,
            "disable_radix_cache": True,
            "schedule_policy": "fcfs",
            "sampling_backend": "pytorch",
            "fp8_gemm_backend": "auto",
            "watchdog_timeout": 600,
            "enable_deterministic_inference": True,
        }
    )
    assert "sglang" not in sys.modules


@needs_sglang
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mem_fraction": 0.8},
            "mem_fraction = 0.8: SGLang has no such argument; perhaps mem_fraction_static is meant",
        ),
        ({"mem_fraction_static": "0.8"}, "mem_fraction_static = '0.8': must be of type float"),
        ({"max_running_requests": True}, "max_running_requests = True: must be of type int"),
        ({"disable_radix_cache": 1}, "disable_radix_cache = 1: must be of type bool"),
        ({"schedule_policy": "fast"}, "schedule_policy = fast: is none of SGLang's choices; choose one of lpm, "),
        # Fields that are no launch argument.
        ({"custom_sigquit_handler": 1}, "custom_sigquit_handler = 1: SGLang has no such argument"),
    ],
)
def test_other_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_server_arguments(arguments)
    assert message in str(error.value)
    assert error.value.field.startswith("rollout.sglang.server_arguments.")


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("tp_size", "rollout.sglang.tensor_parallel_size"),
        ("tp-size", "rollout.sglang.tensor_parallel_size"),
        ("api_key", "this program"),
        ("random_seed", "each server"),
    ],
)
def test_what_the_program_sets_is_refused(name: str, owner: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = 2: is set by {owner}; leave it away"):
        check_server_arguments({name: 2})


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("pp_size", "tensor_parallel_size"),
        ("pipeline-parallel-size", "tensor_parallel_size"),
        ("dp_size", "servers_per_node"),
        ("data_parallel_size", "servers_per_node"),
    ],
)
def test_ranks_that_would_take_each_others_place_are_refused(name: str, way_out: str) -> None:
    with pytest.raises(ConfigError, match=f"= 2: must be 1.*under the same ranks; .*{way_out}"):
        check_server_arguments({name: 2})
    check_server_arguments({name: 1})


def test_attention_over_data_spreads_the_same_ranks() -> None:
    check_server_arguments({"dp-size": 2, "enable-dp-attention": True})


def test_without_sglang_names_are_not_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "path", [])
    sys.path_importer_cache.clear()
    check_server_arguments({"mem_fraction": 0.8})
    assert "cannot be checked here" in caplog.text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def words_after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_a_configuration_becomes_a_command(model: Path) -> None:
    sglang = SglangConfig(
        server_arguments={"max_total_tokens": 4096, "disable_radix_cache": True, "lora_paths": ["a", "b"]}
    )
    rollout = RolloutConfig(engine="sglang", sglang=sglang, replay_routing=True)
    settings = server_settings(ModelConfig(path=model, context_length=512, rope_base=1e6), rollout)
    command = server_command(settings, ServerPlace(host="127.0.0.1", port=7, nccl_port=8), KEY_FILE, cuda=False)
    assert (words_after(command, "--port"), words_after(command, "--nccl-port")) == ("7", "8")
    assert command[:5] == [sys.executable, "-m", "sglang.launch_server", "--config", str(KEY_FILE)]
    assert words_after(command, "--model-path") == str(model)
    assert words_after(command, "--dtype") == "bfloat16"
    assert words_after(command, "--device") == "cpu"
    assert words_after(command, "--context-length") == "512"
    assert json.loads(words_after(command, "--json-model-override-args")) == {
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    assert {"--skip-tokenizer-init", "--enable-return-routed-experts", "--disable-radix-cache"} <= set(command)
    assert "--enable-memory-saver" not in command
    assert command[command.index("--lora-paths") + 1 :][:2] == ["a", "b"]
    assert words_after(command, "--max-total-tokens") == "4096"


def test_servers_on_gpus_share_a_node_and_may_span_several(model: Path) -> None:
    sglang = SglangConfig(tensor_parallel_size=4, nodes_per_server=2, num_agents=4)
    rollout = RolloutConfig(engine="sglang", sglang=sglang, colocated=True)
    settings = server_settings(ModelConfig(path=model), rollout)
    place = ServerPlace(host="10.0.0.2", port=7, node_rank=1, init_address="10.0.0.1:8")
    command = server_command(settings, place, KEY_FILE, cuda=True)
    assert {"--device", "--attention-backend", "--json-model-override-args", "--context-length"}.isdisjoint(command)
    assert "--enable-memory-saver" in command
    assert [words_after(command, flag) for flag in ("--tp-size", "--nnodes", "--node-rank", "--dist-init-addr")] == [
        "4",
        "2",
        "1",
        "10.0.0.1:8",
    ]
    two = server_settings(
        ModelConfig(path=model), RolloutConfig(engine="sglang", sglang=SglangConfig(tensor_parallel_size=4))
    )
    command = server_command(two, ServerPlace(host="127.0.0.1", port=7, index=1), KEY_FILE, cuda=True)
    assert words_after(command, "--base-gpu-id") == "4"


def test_servers_beside_ranks_take_the_devices_behind_theirs(model: Path) -> None:
    def first_device(colocated: bool) -> str:
        settings = server_settings(ModelConfig(path=model), RolloutConfig(engine="sglang", colocated=colocated), 4)
        place = ServerPlace(host="127.0.0.1", port=7)
        return words_after(server_command(settings, place, KEY_FILE, cuda=True), "--base-gpu-id")

    assert (first_device(colocated=False), first_device(colocated=True)) == ("4", "0")


def test_a_server_does_not_take_itself_for_a_rank_of_the_trainer(model: Path) -> None:
    settings = server_settings(ModelConfig(path=model), RolloutConfig(engine="sglang"))
    outer = {"RANK": "3", "MASTER_ADDR": "n1", "TORCHELASTIC_RUN_ID": "x", "PATH": "/bin", "PYTHONPATH": "/mine"}
    on_gpu = server_environment(settings, outer, cuda=True)
    crash = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
    assert on_gpu == {"PATH": "/bin", "PYTHONPATH": "/mine", "PYTHONUNBUFFERED": "1"} | crash
    on_cpu = server_environment(settings, outer, cuda=False)
    assert on_cpu["PYTHONPATH"].endswith("sglang_cpu_shim:/mine")
    assert on_cpu["SGLANG_USE_CPU_ENGINE"] == "1"
    of_user = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "1"}
    assert server_environment(settings, outer | of_user, cuda=True).items() >= of_user.items()
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in on_cpu
