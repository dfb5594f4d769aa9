"""Texts that logits are compared on: the run's own where there are any, else a few short ones."""

from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.runtime.json_files import read_whole_lines
from megatron_fipo.trainer.probe import random_sequences

_MAX_SEQUENCES = 4
_MAX_TOKENS = 64
_TEXTS = (
    "A farmer has 17 sheep and buys 8 more. How many sheep are there now? Let us add: 17 + 8 = 25, so there are 25.",
    "Solve for x: 3x - 7 = 11. Adding 7 to both sides gives 3x = 18, and dividing by 3 gives x = 6.",
    "def greatest_common_divisor(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n",
    "Question: Which number comes next in 1, 1, 2, 3, 5, 8? Answer: each is the sum of the two before, so 13.",
)


def probe_sequences(folder: Path, vocab_size: int, run: Path | None) -> tuple[list[list[int]], str]:
    """Token ids of a few sequences, and what they are.

    Args:
        folder: Where the tokenizer is. Without one that can be read, tokens are random.
        vocab_size: Tokens that the model has.
        run: A run directory, whose newest sampled prompts and responses are taken.
    """
    try:
        tokenizer = load_tokenizer(folder, vocab_size)
    except ConfigError:
        return random_sequences(vocab_size), "random tokens, for want of a tokenizer"
    texts = _sampled(run)
    kind = "the run's own prompts and responses" if texts else "built-in texts"
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts or _TEXTS]
    sequences = [ids[:_MAX_TOKENS] for ids in encoded if len(ids) > 1]
    if not sequences:
        return random_sequences(vocab_size), "random tokens, as the texts have none"
    return sequences, kind


def _sampled(run: Path | None) -> Sequence[str]:
    path = None if run is None else run / "samples.jsonl"
    if path is None or not path.is_file():
        return ()
    records = read_whole_lines(path)[0][-_MAX_SEQUENCES:]
    return [f"{each.get('prompt', '')}{each.get('response', '')}" for each in records]
