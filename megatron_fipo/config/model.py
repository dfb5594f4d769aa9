"""Which model is trained, and in which precision."""

import math
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.config.base import config_class, require


@config_class
class ModelConfig:
    """The Hugging Face model the run starts from, and what is overridden in it."""

    path: Path
    """Hugging Face model folder: config.json, safetensors and tokenizer files."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations. Optimizer state and gradient sums are always float32."""

    context_length: int | None = None
    """Longest position, in tokens; null keeps the model's own. Carried into every export."""

    rope_base: float | None = None
    """Base of the rotary embedding; null keeps the model's own. Carried into every export."""

    log_prob_chunk_tokens: int = 1024
    """Rows that one product with the output matrix covers; float32 temporaries are smaller than that."""

    recompute_logits: bool = False
    """Compute logits again in the backward pass instead of keeping one copy in compute precision."""

    transformer_config_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig to set, by name; unknown names are refused."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("context_length", "rope_base"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                field=name,
                value=value,
                rule="must be positive and finite, or null to keep the model's own",
                way_out="set it to null",
            )
        require(
            self.log_prob_chunk_tokens >= 1,
            field="log_prob_chunk_tokens",
            value=self.log_prob_chunk_tokens,
            rule="must be at least 1",
            way_out="1024 is a good value",
        )

    def check_context_length(self, longest: int) -> None:
        """Refuse a context length that is set below the longest sequence.

        Args:
            longest: Longest prompt and longest response together, in tokens.

        Raises:
            ConfigError: It does not fit.
        """
        require(
            self.context_length is None or longest <= self.context_length,
            field="model.context_length",
            value=self.context_length,
            rule=f"must hold the longest sequence of {longest} tokens",
            way_out=f"raise it to at least {longest}, or shorten prompts or responses",
        )
