"""Model overrides, sizes that a model refuses, and the learning rate over steps."""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.optimizer import OptimizerConfig
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import TinyActor, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("settings")
    for architecture in ("qwen2", "qwen3_moe"):
        write_tiny_model(root / architecture, architecture)
    return root


Refused = tuple[str, dict[str, Any], dict[str, Any]]

OVERRIDES = "model.transformer_config_overrides"
REFUSED: dict[int, dict[str, Refused]] = {
    1: {
        f"{OVERRIDES}.moe_aux_los_coeff = 0.1: is no field of TransformerConfig; did you mean moe_aux_loss_coeff?": (
            "qwen2",
            {},
            {"transformer_config_overrides": {"moe_aux_los_coeff": 0.1}},
        ),
        f"{OVERRIDES}.zzz = 1: is no field of TransformerConfig; see megatron-core's TransformerConfig": (
            "qwen2",
            {},
            {"transformer_config_overrides": {"zzz": 1}},
        ),
        **{
            f"{OVERRIDES}.{name} = {value}: is set by the run's own sections or by the model folder; "
            "set it under model or parallelism, or leave it out": (
                "qwen2",
                {},
                {"transformer_config_overrides": {name: value}},
            )
            for name, value in {"sequence_parallel": True, "num_layers": 2, "attention_dropout": 0.1}.items()
        },
    },
    2: {
        "parallelism.expert_model_parallel_size = 2: must divide the model's experts: 1 / 2 is not a whole number; "
        "choose a divisor of 1": ("qwen2", {"expert_model_parallel_size": 2}, {}),
        "parallelism.expert_tensor_parallel_size = 2: must divide the hidden size of the model's experts: 1 / 2 is not "
        "a whole number; choose a divisor of 1": ("qwen2", {"expert_tensor_parallel_size": 2}, {}),
        "parallelism.sequence_parallel = False: must be true for a mixture of experts with "
        "tensor_model_parallel_size = 2: megatron-core refuses to train it otherwise; set it to true": (
            "qwen3_moe",
            {"tensor_model_parallel_size": 2},
            {},
        ),
        "parallelism.pipeline_model_parallel_size = 2: must divide the model's layers: 4 / 6 is not a whole number "
        "(pipeline × virtual stages); choose a divisor of 4": (
            "qwen2",
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            {},
        ),
    },
    3: {
        "parallelism.expert_model_parallel_size = 3: must divide the model's experts: 4 / 3 is not a whole number; "
        "choose a divisor of 4": ("qwen3_moe", {"expert_model_parallel_size": 3}, {}),
        "parallelism.pipeline_model_parallel_size = 3: must divide the model's layers: 4 / 3 is not a whole number; "
        "choose a divisor of 4": ("qwen2", {"pipeline_model_parallel_size": 3}, {}),
    },
    4: {
        "parallelism.tensor_model_parallel_size = 4: must divide the model's key-value heads: 2 / 4 is not a whole "
        "number; choose a divisor of 2": ("qwen2", {"tensor_model_parallel_size": 4}, {}),
    },
}


def messages(root: Path, cases: list[Refused]) -> list[str]:
    found = []
    for architecture, parallelism, model in cases:
        with pytest.raises(ConfigError) as caught, tiny_actor(root / architecture, parallelism, **model):
            pass
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize("world_size", REFUSED)
def test_what_the_model_does_not_allow_is_refused_on_every_rank(root, world_size):
    cases = REFUSED[world_size]
    for found in run_distributed(messages, world_size, root, list(cases.values())):
        assert found == list(cases)


def auxiliary_losses(root: Path) -> list[float]:
    found = []
    for overrides in ({}, {"moe_aux_loss_coeff": 0.01}):
        with tiny_actor(root / "qwen3_moe", transformer_config_overrides=overrides) as actor:
            found.append(actor.provider.moe_aux_loss_coeff)
    return found


def test_auxiliary_losses_are_off_unless_asked_for(root):
    assert run_distributed(auxiliary_losses, 1, root) == [[0.0, 0.01]]


LEARNING_RATES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "constant": ({}, [8e-4] * 6),
    "warm-up": ({"warmup_steps": 4}, [2e-4, 4e-4, 6e-4, 8e-4, 8e-4, 8e-4]),
    "linear": (
        {"warmup_steps": 2, "schedule": "linear", "decay_steps": 6, "min_learning_rate": 2e-4},
        [4e-4, 8e-4, 6.5e-4, 5e-4, 3.5e-4, 2e-4, 2e-4],
    ),
    "cosine": ({"schedule": "cosine", "decay_steps": 4}, [8e-4, 6.828427e-4, 4e-4, 1.171573e-4, 0.0, 0.0]),
}


def rates(root: Path) -> dict[str, list[float]]:
    """Learning rate of every step, each taken with a zero gradient."""
    found = {}
    with tiny_actor(root / "qwen2") as actor:
        for name, (settings, expected) in LEARNING_RATES.items():
            optimizer = optimizer_of(actor, settings)
            found[name] = []
            for _ in expected:
                found[name].append(optimizer.learning_rate)
                optimizer.zero_grad()
                assert optimizer.step().applied
    return found


def optimizer_of(actor: TinyActor, settings: dict[str, Any]) -> ActorOptimizer:
    config = OptimizerConfig(**{"learning_rate": 8e-4, "warmup_steps": 0, "weight_decay": 0.0, **settings})
    return ActorOptimizer(actor.chunks, config, bf16=False)


def test_the_learning_rate_follows_its_schedule(root):
    (found,) = run_distributed(rates, 1, root)
    for name, (_, expected) in LEARNING_RATES.items():
        assert found[name] == pytest.approx(expected, rel=1e-5, abs=1e-10), name
