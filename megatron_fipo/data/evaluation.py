"""The prompts that evaluation tries: of sources of their own, or held out of the training sources."""

import itertools
import logging

from transformers import PreTrainedTokenizerBase

from megatron_fipo.config.data import DataConfig, PromptFormat, PromptSource
from megatron_fipo.data.duplicates import skip_duplicates
from megatron_fipo.data.problem import SkipReason
from megatron_fipo.data.row_index import SkippedRows
from megatron_fipo.data.source import Source, open_sources
from megatron_fipo.data.stream import PromptStream
from megatron_fipo.types import Prompt

logger = logging.getLogger(__name__)


def load_evaluation_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    stream: PromptStream | None = None,
) -> tuple[Prompt, ...]:
    """Load the prompts of `data.evaluation`, source by source, or those of `data.held_out`; none without either.

    Rows that cannot be used are counted and reported by number. Prompts that also occur among the training prompts are
    counted and reported too: more than 0 makes the evaluation, in part, a measure of what was learnt by heart.

    Args:
        config: Sources, and how prompts become tokens.
        tokenizer: The model's tokenizer.
        limit: Prompts of each source at most; None for all.
        stream: The training prompts, where they are open already.

    Raises:
        ConfigError: A source cannot be read or has no usable prompt.
    """
    if config.held_out is not None:
        stream = stream or PromptStream(config, tokenizer, seed=0)
        assert stream.held_out is not None, "the stream is that of the same configuration"
        return stream.held_out.prompts(limit)
    if config.evaluation is None:
        return ()
    return load_sources(config.evaluation, config, tokenizer, limit=limit, stream=stream)


def load_sources(
    given: PromptSource | tuple[PromptSource, ...],
    config: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    stream: PromptStream | None = None,
) -> tuple[Prompt, ...]:
    """Load the prompts of the sources of `data.evaluation`, as `load_evaluation_prompts` does."""
    prompts: list[Prompt] = []
    for source in open_sources(given, config, tokenizer, "data.evaluation"):
        prompts += _load(source, config.deduplicate, limit, stream)
    return tuple(prompts)


def _load(source: Source, deduplicate: bool, limit: int | None, stream: PromptStream | None) -> list[Prompt]:
    if deduplicate:
        skip_duplicates([source])
    source.report()
    skipped: dict[SkipReason, SkippedRows] = {}
    prompts = list(itertools.islice(source.prompts(skipped), limit))
    if not prompts:
        raise source.unusable(skipped)
    source.warn(skipped)
    num_tried = len(prompts) + sum(rows.count for rows in skipped.values())
    if stream is not None and (shared := stream.count_shared(source.ranks[:num_tried])):
        logger.warning(
            "%s: %d of %d evaluation prompts also occur among the training prompts", source.origin, shared, num_tried
        )
    return prompts
