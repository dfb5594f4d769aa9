"""Where prompts come from."""

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.config.base import config_class, require, require_pattern

PROBLEMS_PER_SEED = 2**20
"""Distance between the generator seeds of neighbouring reasoning-gym sets: the largest set without
overlap."""

_LARGEST_SEED = 2**32 // PROBLEMS_PER_SEED - 1


@config_class
class JsonlPrompts:
    """Prompts from a JSONL file: one object a line."""

    type: Literal["jsonl"] = "jsonl"
    """Selects this kind."""

    path: Path
    """The file, in UTF-8."""

    prompt_field: str = "prompt"
    """Key of the prompt: a string, or with prompt_format chat also a list of chat messages."""

    answer_field: str = "answer"
    """Key of the reference answer: a string, or a number, which is kept as it is written."""

    def __post_init__(self) -> None:
        """Check combinations."""
        require(
            self.prompt_field != self.answer_field,
            field="answer_field",
            value=self.answer_field,
            rule="must differ from prompt_field",
            way_out="name the key that holds the reference answer",
        )


@config_class
class ReasoningGymPrompts:
    """Prompts from a reasoning-gym task generator."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    """Selects this kind."""

    task: str
    """Name of the task, such as chain_sum."""

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


PromptSource = JsonlPrompts | ReasoningGymPrompts


@config_class
class DataConfig:
    """Training and evaluation prompts."""

    train: PromptSource
    """Prompts that rollouts are drawn from."""

    evaluation: PromptSource | None = None
    """Held-out prompts; null leaves evaluation out."""

    prompt_format: Literal["chat", "raw"] = "chat"
    """"chat" puts the prompt through the tokenizer's chat template, "raw" tokenizes the text as it is (with the
    tokenizer's own beginning-of-sequence token, where it adds one)."""

    system_prompt: str | None = None
    """System message in front of every chat prompt that does not bring its own."""

    max_prompt_tokens: int = 2048
    """Longer prompts are skipped and counted."""

    shuffle: bool = True
    """Draw prompts in a seeded random order, anew each epoch; else in file order."""

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
            self.system_prompt is None or self.prompt_format == "chat",
            field="system_prompt",
            value=self.system_prompt,
            rule='needs prompt_format = "chat"',
            way_out='set prompt_format to "chat", or put the text into the prompts',
        )
