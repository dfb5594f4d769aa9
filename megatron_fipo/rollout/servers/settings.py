"""From a configuration to what all of a run's servers have in common."""

from typing import Any

from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.conversion.hf_folder import model_config_for, read_model_config
from megatron_fipo.rollout.servers.command import ServerSettings


def server_settings(model: ModelConfig, rollout: RolloutConfig, local_ranks: int = 0) -> ServerSettings:
    """What a configuration says about servers.

    Args:
        model: The model.
        rollout: Generation; its further arguments for SGLang are taken as checked.
        local_ranks: Ranks of the trainer on the servers' nodes, each with a GPU.
    """
    sglang = rollout.sglang
    # Token ids in and out.
    arguments: dict[str, Any] = {
        "model_path": str(model.path.absolute()),
        "dtype": model.dtype,
        "skip_tokenizer_init": True,
        "json_model_override_args": _changed_model_config(model),
        "context_length": model.context_length,
        "enable_return_routed_experts": rollout.replay_routing,
        "enable_memory_saver": rollout.colocated,
    }
    return ServerSettings(
        arguments=sglang.server_arguments | {name: value for name, value in arguments.items() if value},
        tensor_parallel_size=sglang.tensor_parallel_size,
        nodes_per_server=sglang.nodes_per_server,
        servers_per_node=sglang.servers_per_node,
        start_timeout_s=sglang.start_timeout_s,
        first_device=0 if rollout.colocated else local_ranks,
    )


def _changed_model_config(model: ModelConfig) -> dict[str, Any]:
    """Fields of the model's config.json that the run trains with other values of."""
    source = read_model_config(model.path)
    changed = model_config_for(source, model.dtype, model.context_length, model.rope_base)
    names = ("max_position_embeddings", "rope_theta", "rope_parameters")
    return {name: changed[name] for name in names if changed.get(name) != source.get(name)}
