"""Reads a prompt source into prompts, counting what it has to leave out."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import DataConfig, JsonlPrompts, PromptSource
from megatron_fipo.data.encoding import EncodingError, PromptEncoder
from megatron_fipo.data.jsonl import read_jsonl
from megatron_fipo.data.problem import BadRow, Problem, SkipReason
from megatron_fipo.data.reasoning_gym import make_problems
from megatron_fipo.types import Prompt

_SHOWN_ROWS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRows:
    """Rows of a source that were left out for the same reason.

    Attributes:
        count: How many.
        first_rows: The first few, as in `Problem.row`.
        detail: What is wrong with the first.
    """

    count: int
    first_rows: tuple[int, ...]
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The usable prompts of a source, in its order.

    Attributes:
        prompts: The prompts, never none.
        skipped: The rows left out, by reason.
    """

    prompts: tuple[Prompt, ...]
    skipped: Mapping[SkipReason, SkippedRows]

    @property
    def num_skipped(self) -> int:
        """Rows left out, for whatever reason."""
        return sum(rows.count for rows in self.skipped.values())

    @property
    def fingerprint(self) -> str:
        """Digest of ids, tokens and reference answers: equal where a resumed run meets the same prompts."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            fields = (
                prompt.id.encode(),
                prompt.token_ids.astype("<i4").tobytes(),
                repr(prompt.answer).encode(),
            )
            for content in fields:
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


def load_prompts(source: PromptSource, config: DataConfig, tokenizer: PreTrainedTokenizerBase, field: str) -> PromptSet:
    """Read all prompts of a source.

    A row that cannot be used is counted, reported with its number in one warning for each reason, and left
    out. A prompt's id is "<file name>:<line>" or "<task>-<seed>:<index>".

    Args:
        source: Where the prompts come from.
        config: How they become tokens, and how long they may be.
        tokenizer: The model's tokenizer.
        field: Where the source lies in the configuration, such as data.train; for messages.

    Raises:
        ConfigError: The source cannot be read, the format does not suit the tokenizer, or no prompt is
            usable.
    """
    encoder = PromptEncoder(tokenizer, config, section=field.rpartition(".")[0])
    if isinstance(source, JsonlPrompts):
        name, rows = source.path.stem, read_jsonl(source, field)
        key, origin = "path", str(source.path)
    else:
        name, rows = f"{source.task}-{source.seed}", make_problems(source, field)
        key, origin = "task", source.task
    prompts, bad_rows = [], []
    for outcome in _encode(rows, encoder, name):
        if isinstance(outcome, BadRow):
            bad_rows.append(outcome)
        else:
            prompts.append(outcome)
    skipped = _count(bad_rows)
    reports = [_report(reason, rows) for reason, rows in skipped.items()]
    if not prompts:
        raise ConfigError(
            field=f"{field}.{key}",
            value=origin,
            rule=f"holds no usable prompt ({'; '.join(reports) or 'it is empty'})",
            way_out="correct the source, or the fields of data that describe it",
        )
    for report in reports:
        logger.warning("%s = %s: skipped %s", field, origin, report)
    return PromptSet(prompts=tuple(prompts), skipped=skipped)


def _encode(rows: Iterable[Problem | BadRow], encoder: PromptEncoder, name: str) -> Iterator[Prompt | BadRow]:
    limit = encoder.config.max_prompt_tokens
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            text, token_ids = encoder.encode(row.prompt)
        except EncodingError as error:
            yield BadRow(row.row, "broken", str(error))
            continue
        if len(token_ids) == 0:
            yield BadRow(row.row, "empty", "no tokens")
        elif len(token_ids) > limit:
            detail = f"{len(token_ids)} tokens, {encoder.section}.max_prompt_tokens = {limit}"
            yield BadRow(row.row, "over_long", detail)
        else:
            yield Prompt(
                id=f"{name}:{row.row}",
                token_ids=token_ids,
                text=text,
                answer=row.answer,
                metadata=row.metadata,
            )


def _count(bad_rows: list[BadRow]) -> dict[SkipReason, SkippedRows]:
    by_reason: dict[SkipReason, list[BadRow]] = {}
    for bad_row in bad_rows:
        by_reason.setdefault(bad_row.reason, []).append(bad_row)
    return {
        reason: SkippedRows(
            count=len(rows), first_rows=tuple(row.row for row in rows[:_SHOWN_ROWS]), detail=rows[0].detail
        )
        for reason, rows in by_reason.items()
    }


def _report(reason: SkipReason, rows: SkippedRows) -> str:
    shown = ", ".join(str(row) for row in rows.first_rows)
    more = ", ..." if rows.count > len(rows.first_rows) else ""
    noun = "row" if rows.count == 1 else "rows"
    return f"{rows.count} {reason} {noun} ({shown}{more}), the first with {rows.detail}"


def count_shared(train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> int:
    """Count the evaluation prompts that training also holds, compared by their tokens.

    More than 0 makes the evaluation, in part, a measure of what was learnt by heart. Whether that matters is the
    caller's decision: a task with few possible problems cannot avoid it.
    """
    trained_on = {prompt.token_ids.tobytes() for prompt in train}
    return sum(prompt.token_ids.tobytes() in trained_on for prompt in evaluation)
