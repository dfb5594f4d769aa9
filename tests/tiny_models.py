"""Tiny random Hugging Face model folders with a byte-level tokenizer, written once per test session."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 301
EOS_TOKEN_ID = 256

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": EOS_TOKEN_ID,
    "bos_token_id": None,
}
_MOE = {
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


def write_tiny_model(
    folder: Path,
    architecture: str = "qwen2",
    *,
    tied: bool = True,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
    **shape: int,
) -> Path:
    """Write a random float32 model of the given architecture, with tokenizer, and return its folder.

    `shape` holds fields of its configuration, `scales` factors of the usual weights by a part of a parameter's name,
    of which the first that fits counts.
    """
    torch.manual_seed(seed)
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_SHAPE | shape, tie_word_embeddings=tied))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_SHAPE | {"head_dim": 16} | shape, tie_word_embeddings=tied))
    elif architecture == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE | _MOE | shape, tie_word_embeddings=False))
    else:
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE | shape, tie_word_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(1.0)
        parameter.data.mul_(next((factor for part, factor in (scales or {}).items() if part in name), 1.0))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and <eos>, with a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<eos>": EOS_TOKEN_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template="{% for m in messages %}{{m['role']}}: {{m['content']}}\n{% endfor %}",
    )


def add_output_matrix(folder: Path, factor: float) -> Path:
    """Give a tied model an output matrix all the same, the embedding times a factor; returns the folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
