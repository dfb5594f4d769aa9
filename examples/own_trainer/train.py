"""FIPO in a plain transformers loop: sample groups of responses, reward them, and update several times on each rollout.

The task: the prompt names a digit, and the response is to repeat it. The reward is how often it does, over the tokens
that it may have. From megatron_fipo come advantages, loss and metrics, which need torch alone; the rest is anybody's.

    python examples/own_trainer/train.py                  # a random model of 0.1 M parameters
    python examples/own_trainer/train.py --model FOLDER   # a model folder, or a name on the Hub
"""

import argparse
import random
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from megatron_fipo.algorithms.advantages import group_relative_advantages
from megatron_fipo.algorithms.losses import fipo_loss
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.types import merge_metrics, render_metrics

GROUP_SIZE, RESPONSE_TOKENS, TEMPERATURE = 8, 16, 1.0


def main() -> None:
    """Train, and print the mean reward and some of the loss's metrics after every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name; without it, a random model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16, help=f"prompts a step, with {GROUP_SIZE} responses each")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    model, tokenizer = load(options.model) if options.model else tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    # "paper-v2" averages over all tokens of an update. The number of updates is what makes FIPO differ from DAPO.
    config = FipoConfig.preset("paper-v2", updates_per_rollout=4)

    for step in range(1, options.steps + 1):
        digits = [digit for digit in draw.choices("0123456789", k=options.prompts) for _ in range(GROUP_SIZE)]
        rollout = sample_responses(model, tokenizer, [f"{digit}=" for digit in digits])
        texts = tokenizer.batch_decode(rollout.token_ids[:, rollout.prompt_length :], skip_special_tokens=True)
        rewards = torch.tensor([text.count(digit) / RESPONSE_TOKENS for text, digit in zip(texts, digits, strict=True)])
        groups = torch.arange(len(digits)) // GROUP_SIZE
        metrics = update(model, optimizer, config, rollout, group_relative_advantages(rewards, groups))
        names = ("train/loss", "train/policy_kl_k3", "fipo/influence_weight_mean", "fipo/fraction_changed")
        shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in names)
        print(f"step {step}: reward {rewards.mean():.3f}, {shown}", flush=True)


@dataclass
class Rollout:
    """Sequences of prompt and response: token_ids and attention_mask [N, P + R], response_mask [N, R], P."""

    token_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    prompt_length: int


@torch.no_grad()
def sample_responses(model, tokenizer, prompts: list[str]) -> Rollout:
    """One response a prompt. Top-k and top-p stay off: the loss is about the distribution that is sampled from."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    token_ids = model.generate(**inputs, **sampling, max_new_tokens=RESPONSE_TOKENS)
    prompt_length = inputs["input_ids"].shape[1]
    # A response ends with its first end-of-sequence token; what follows is padding.
    ends = (token_ids[:, prompt_length:] == tokenizer.eos_token_id).long()
    response_mask = ends.cumsum(1) - ends == 0
    return Rollout(token_ids, torch.cat([inputs["attention_mask"], response_mask], 1), response_mask, prompt_length)


def update(model, optimizer, config: FipoConfig, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
    """Take `config.updates_per_rollout` optimizer steps; returns the metrics of all of them together."""
    mini_batches = torch.arange(len(advantages)).chunk(config.updates_per_rollout)
    # Before the first update, and cut in the same way: then every ratio of the first update is exactly 1.
    with torch.no_grad():
        old_log_probs = [response_log_probs(model, rollout, rows) for rows in mini_batches]
    accumulators = []
    for rows, old in zip(mini_batches, old_log_probs, strict=True):
        log_probs = response_log_probs(model, rollout, rows)
        result = fipo_loss(log_probs, old, advantages[rows], rollout.response_mask[rows], config)
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        accumulators.append(result.accumulators)
    return render_metrics(merge_metrics(accumulators))


def response_log_probs(model, rollout: Rollout, rows: Tensor) -> Tensor:
    """Log-probabilities [rows, R] of the responses' tokens, at the temperature that they were sampled with."""
    token_ids, attention_mask = rollout.token_ids[rows], rollout.attention_mask[rows]
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=token_ids, attention_mask=attention_mask, position_ids=positions).logits
    log_probs = (logits[:, rollout.prompt_length - 1 : -1].float() / TEMPERATURE).log_softmax(-1)
    return log_probs.gather(-1, token_ids[:, rollout.prompt_length :, None]).squeeze(-1)


def load(name: str):
    """A pretrained model in float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer


def tiny_model():
    """A random Qwen2 model of 0.1 M parameters, and a tokenizer with one token for each character."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"0123456789="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    config = Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


if __name__ == "__main__":
    main()
