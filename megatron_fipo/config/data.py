"""Where prompts come from."""

import re
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.config.base import config_class, require, require_pattern

PROBLEMS_PER_SEED = 2**20
"""Distance between the generator seeds of neighbouring reasoning-gym sets: the largest set without
overlap."""

_LARGEST_SEED = 2**32 // PROBLEMS_PER_SEED - 1


def _require_name_and_weight(name: str | None, weight: float) -> None:
    require(
        name is None or re.fullmatch(r"[\w.-]+", name, re.ASCII) is not None,
        field="name",
        value=name,
        rule="must be made of letters, digits, dots, hyphens and underscores, because metrics are named after it",
        way_out='give a short name, such as "gsm8k"',
    )
    require(
        1e-9 <= weight <= 1e9,
        field="weight",
        value=weight,
        rule="must lie in [1e-9, 1e9]: it is the source's share of the draws, relative to the others'",
        way_out="give a positive number, or leave the source out",
    )


@config_class
class FilePrompts:
    """What prompt files of every format have in common."""

    path: Path
    """The file."""

    name: str | None = None
    """Name of the source in metrics and prompt ids; null takes the file's name without its ending."""

    weight: float = 1.0
    """Share of the draws, relative to the weights of the other training sources."""

    prompt_field: str | None = None
    """Column of the prompt: text, or with prompt_format chat also a list of messages. A dotted path reaches into nested
    columns. Null recognises the columns (docs/data.md); with answer_field given it is "prompt"."""

    answer_field: str | None = None
    """Column of the reference answer: text, or a number, which is kept as it is written. A dotted path such as
    reward_model.ground_truth reaches into nested columns. Null recognises the columns; with prompt_field given it is
    "answer"."""

    answer_pattern: str | None = None
    """Regular expression whose first group is the reference within the answer column, the last match counting; null
    takes the whole column, or what a recognised schema says."""

    def __post_init__(self) -> None:
        """Check values and combinations."""
        _require_name_and_weight(self.name, self.weight)
        for name in ("prompt_field", "answer_field"):
            require(
                getattr(self, name) is None or all(getattr(self, name).split(".")),
                field=name,
                value=getattr(self, name),
                rule="must name a column, or nested columns with a dot between them",
                way_out='write it like "question" or "reward_model.ground_truth"',
            )
        if self.prompt_field is not None or self.answer_field is not None:
            require(
                (self.prompt_field or "prompt") != (self.answer_field or "answer"),
                field="answer_field",
                value=self.answer_field or "answer",
                rule="must differ from prompt_field",
                way_out="name the key that holds the reference answer",
            )
        if self.answer_pattern is not None:
            require_pattern(self.answer_pattern, field="answer_pattern", group_holds="the reference answer")


@config_class
class JsonlPrompts(FilePrompts):
    """Prompts from a JSONL file: one object a line, in UTF-8."""

    type: Literal["jsonl"] = "jsonl"
    """Selects this kind."""


@config_class
class ParquetPrompts(FilePrompts):
    """Prompts from a Parquet file."""

    type: Literal["parquet"] = "parquet"
    """Selects this kind."""


@config_class
class ReasoningGymPrompts:
    """Prompts from a reasoning-gym task generator."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    """Selects this kind."""

    task: str
    """Name of the task, such as chain_sum."""

    name: str | None = None
    """Name of the source in metrics and prompt ids; null takes "<task>-<seed>"."""

    weight: float = 1.0
    """Share of the draws, relative to the weights of the other training sources."""

    size: int = 10_000
    """Number of problems in the set."""

    seed: int = 0
    """Which set: problem i is the one that reasoning-gym makes with seed seed * 2**20, at index i. Sets with
    other seeds draw anew; in a task with few possible problems they still meet the same ones."""

    parameters: dict[str, Any] = field(default_factory=dict)
    """The task's own parameters, such as min_terms."""

    question_pattern: str | None = None
    """Regular expression whose first group is the part of the question that is used; null uses all of it."""

    question_template: str = "{question}"
    """Text around the question; {question} is replaced."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        _require_name_and_weight(self.name, self.weight)
        require(
            1 <= self.size <= PROBLEMS_PER_SEED,
            field="size",
            value=self.size,
            rule=f"must lie in [1, {PROBLEMS_PER_SEED}]",
            way_out="give the number of problems",
        )
        if self.question_pattern is not None:
            require_pattern(self.question_pattern, field="question_pattern", group_holds="the question")
        require(
            0 <= self.seed <= _LARGEST_SEED,
            field="seed",
            value=self.seed,
            rule=f"must lie in [0, {_LARGEST_SEED}]",
            way_out="use a small number, another one for each set",
        )
        for name in ("size", "seed"):
            require(
                name not in self.parameters,
                field=f"parameters.{name}",
                value=self.parameters.get(name),
                rule=f"{name} is not one of the task's own parameters",
                way_out=f"write it as {name} beside parameters",
            )
        require(
            "{question}" in self.question_template,
            field="question_template",
            value=self.question_template,
            rule="must contain {question}",
            way_out="put {question} where the problem goes",
        )


PromptSource = JsonlPrompts | ParquetPrompts | ReasoningGymPrompts


def default_name(source: PromptSource) -> str:
    """The name of a source that is given none, made from where its prompts come from."""
    if isinstance(source, ReasoningGymPrompts):
        return f"{source.task}-{source.seed}"
    return re.sub(r"[^\w.-]", "_", source.path.stem, flags=re.ASCII) or "prompts"


def source_names(given: PromptSource | tuple[PromptSource, ...]) -> list[str]:
    """Names of the sources of one field, in order."""
    return [source.name or default_name(source) for source in (given if isinstance(given, tuple) else (given,))]


def check_sources(field: str, given: PromptSource | tuple[PromptSource, ...]) -> None:
    """Check what spans the sources of one field, "train" or "evaluation".

    Raises:
        ConfigError: There are none, two have one name, or sources for evaluation have weights.
    """
    sources = given if isinstance(given, tuple) else (given,)
    require(
        len(sources) > 0,
        field=field,
        value="[]",
        rule="must name at least one source",
        way_out="add a source" if field == "train" else "set it to null for none",
    )
    names = source_names(given)
    for place, (source, name) in enumerate(zip(sources, names, strict=True)):
        require(
            name not in names[:place],
            field=f"{field}.{place}.name",
            value=name,
            rule=f"is also the name of {field}.{names.index(name)}, and results are told apart by it",
            way_out="give each source a name of its own",
        )
        require(
            field == "train" or source.weight == 1.0,
            field=f"{field}.{place}.weight" if isinstance(given, tuple) else f"{field}.weight",
            value=source.weight,
            rule="has no meaning for evaluation, which takes every source's prompts in turn",
            way_out="leave it out",
        )


@config_class
class PromptFormat:
    """How prompts become tokens, and which are usable."""

    prompt_format: Literal["chat", "raw"] = "chat"
    """"chat" puts the prompt through the tokenizer's chat template, "raw" tokenizes the text as it is (with the
    tokenizer's own beginning-of-sequence token, where it adds one)."""

    system_prompt: str | None = None
    """System message in front of every chat prompt that does not bring its own."""

    min_prompt_tokens: int = 1
    """Shorter prompts are skipped and counted."""

    max_prompt_tokens: int = 2048
    """Longer prompts are skipped and counted."""

    deduplicate: bool = True
    """Of prompts with the same content, white space aside, keep the first; counted over all training sources, and
    within each evaluation source."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        require(
            self.max_prompt_tokens >= 1,
            field="max_prompt_tokens",
            value=self.max_prompt_tokens,
            rule="must be at least 1",
            way_out="2048 is a good value",
        )
        require(
            1 <= self.min_prompt_tokens <= self.max_prompt_tokens,
            field="min_prompt_tokens",
            value=self.min_prompt_tokens,
            rule=f"must lie in [1, max_prompt_tokens = {self.max_prompt_tokens}]",
            way_out="1 keeps every prompt",
        )
        require(
            self.system_prompt is None or self.prompt_format == "chat",
            field="system_prompt",
            value=self.system_prompt,
            rule='needs prompt_format = "chat"',
            way_out='set prompt_format to "chat", or put the text into the prompts',
        )


@config_class
class DataConfig(PromptFormat):
    """Training and evaluation prompts."""

    train: PromptSource | tuple[PromptSource, ...]
    """Prompts that rollouts are drawn from: one source, or a list of sources with weights."""

    evaluation: PromptSource | tuple[PromptSource, ...] | None = None
    """Held-out prompts: one source, or a list of sources; null leaves evaluation out, or takes held_out."""

    held_out: int | float | None = None
    """Prompts taken from the training sources for evaluation and never drawn for training: a number of them, or a
    fraction below 1. Which ones depends on their content alone. Null takes none."""

    shuffle: bool = True
    """Draw prompts in a seeded random order, anew each epoch; else in file order."""

    epochs: int | None = None
    """How often each prompt may be drawn at most; the run ends when a source's prompts have been. Null sets no
    bound."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        PromptFormat.__post_init__(self)
        check_sources("train", self.train)
        if self.evaluation is not None:
            check_sources("evaluation", self.evaluation)
        require(
            self.epochs is None or self.epochs >= 1,
            field="epochs",
            value=self.epochs,
            rule="must be at least 1",
            way_out="give how often each prompt may be drawn, or null for no bound",
        )
        if self.held_out is not None:
            self._check_held_out(self.held_out)

    @property
    def has_evaluation(self) -> bool:
        """Whether there are prompts to evaluate on."""
        return self.evaluation is not None or self.held_out is not None

    def _check_held_out(self, held_out: int | float) -> None:
        require(
            self.evaluation is None,
            field="held_out",
            value=held_out,
            rule="must be null where evaluation names prompts",
            way_out="keep one of the two",
        )
        if isinstance(held_out, float):
            require(
                0 < held_out < 1,
                field="held_out",
                value=held_out,
                rule="must lie in (0, 1) to be a fraction of the training prompts",
                way_out="write a fraction such as 0.01, or a number of prompts such as 500",
            )
        else:
            require(
                held_out >= 1,
                field="held_out",
                value=held_out,
                rule="must be at least 1 to be a number of prompts",
                way_out="write a number such as 500, or null for none",
            )
