"""What generating needs to know of a model folder, checked: its positions, and how its tokens are drawn."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_fipo.config.base import require
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.data.tokenizer import stop_token_ids
from megatron_fipo.rollout.engine import SamplingParameters


def check_positions(max_prompt_tokens: int, config: RolloutConfig, positions: int) -> None:
    """Refuse sequences beyond the positions that the model was made for.

    Args:
        max_prompt_tokens: Longest prompt.
        config: Longest response.
        positions: Those of the model, or of `model.context_length`.

    Raises:
        ConfigError: The longest sequence does not fit.
    """
    longest = max_prompt_tokens + config.max_response_tokens
    require(
        longest <= positions,
        field="rollout.max_response_tokens",
        value=config.max_response_tokens,
        rule=f"must not exceed, with data.max_prompt_tokens = {max_prompt_tokens}, the model's {positions} positions",
        way_out=f"shorten prompts or responses, or set model.context_length to {longest} or more",
    )


def training_sampling(config: RolloutConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> SamplingParameters:
    """How tokens are drawn in training.

    Args:
        config: Temperature, nucleus, limit and further stop tokens.
        folder: Model folder, which has stop tokens of its own.
        tokenizer: The model's tokenizer.
    """
    return SamplingParameters(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_response_tokens,
        stop_token_ids=stop_token_ids(folder, tokenizer, config.stop_token_ids),
    )
