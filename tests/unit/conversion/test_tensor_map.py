"""Names, shapes and rows of tensors, and architectures that are not translated."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion.hf_folder import check_weights
from megatron_fipo.conversion.tensor_map import tensor_map

SHAPE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SHAPE, architectures=["Qwen2ForCausalLM"]),
    "qwen2, tied": Qwen2Config(**SHAPE, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True),
    "qwen2, one group": Qwen2Config(**SHAPE | {"num_key_value_heads": 1}, architectures=["Qwen2ForCausalLM"]),
    "qwen3, wide heads": Qwen3Config(**SHAPE, head_dim=16, architectures=["Qwen3ForCausalLM"]),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **MOE, head_dim=8, architectures=["Qwen3MoeForCausalLM"]),
    "llama": LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folders_tensors_are_those_of_transformers(name: str, tmp_path: Any) -> None:
    config = CONFIGS[name]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    expected = {name: tuple(shape) for name, shape in check_weights(tmp_path).items()}
    links = tensor_map(config)
    assert {tensor.name: tensor.shape for link in links for tensor in link.hf} == expected
    assert len({name for link in links for name in link.names}) == sum(len(link.names) for link in links)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_split_is_joined_again(name: str) -> None:
    for link in tensor_map(CONFIGS[name]):
        whole = torch.randn(link.shape)
        parts = list(link.split(whole))
        assert [tuple(part.shape) for part in parts] == [tensor.shape for tensor in link.hf]
        assert torch.equal(link.join(parts), whole)


def test_rows_of_queries_keys_and_values() -> None:
    (link,) = (each for each in tensor_map(CONFIGS["qwen2"]) if each.name.endswith("0.self_attention.linear_qkv.bias"))
    # 6 heads of 8 rows in 2 groups: three of queries, one of keys, one of values, twice.
    queries, keys, values = link.split(torch.arange(80))
    assert queries.tolist() == [*range(24), *range(40, 64)]
    assert keys.tolist() == [*range(24, 32), *range(64, 72)]
    assert values.tolist() == [*range(32, 40), *range(72, 80)]


def test_padding_rows_are_left_out() -> None:
    embedding = tensor_map(CONFIGS["qwen2"])[0]
    assert embedding.may_be_padded
    (part,) = embedding.split(torch.randn(304, 48))
    assert part.shape == (301, 48)


def test_the_norm_before_experts_has_a_name_of_its_own_in_transformer_engine() -> None:
    names = {
        own: [link.names for link in tensor_map(CONFIGS["qwen3_moe"], prefers_own_norm=own) if len(link.names) > 1]
        for own in (False, True)
    }
    first = ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight")
    assert names[False][0] == first and names[True][0] == first[::-1]
    assert len(names[True]) == 2


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            Qwen2Config(architectures=["Qwen2ForTokenClassification"]),
            "config.json = Qwen2ForTokenClassification: is no",
        ),
        (PretrainedConfig(), "config.json = : is no architecture that is converted; convert a Qwen2"),
        (LlamaConfig(attention_bias=True), "config.json: attention_bias = True: is converted only where it is False"),
        (LlamaConfig(mlp_bias=True), "config.json: mlp_bias = True: is converted only where it is False"),
        (Qwen3MoeConfig(mlp_only_layers=[1]), r"mlp_only_layers = \[1\]: is converted only where it is \[\]"),
        (Qwen3MoeConfig(decoder_sparse_step=2), "decoder_sparse_step = 2: is converted only where it is 1"),
        (LlamaConfig(quantization_config={"bits": 4}), "quantization_config = .*: is converted only where it is None"),
    ],
)
def test_what_is_not_translated_is_refused(config: PretrainedConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("= :", "= .*:")):
        tensor_map(config)
