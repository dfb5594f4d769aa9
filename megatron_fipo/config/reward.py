"""How a response is scored: a sum of named terms."""

import math
import re
from dataclasses import field
from typing import Literal

from megatron_fipo.config.base import ConfigError, config_class, require, require_pattern

_TERM_NAME = re.compile(r"[a-z][a-z0-9_]*")


@config_class
class TermConfig:
    """What all terms share."""

    weight: float = 1.0
    """Factor of the term's score in the reward."""

    def __post_init__(self) -> None:
        """Check the weight."""
        require(
            math.isfinite(self.weight),
            field="weight",
            value=self.weight,
            rule="must be finite",
            way_out="1 is the usual weight",
        )


@config_class
class MathTerm(TermConfig):
    """1 where math-verify finds the answer equal to the reference answer, else 0."""

    type: Literal["math"] = "math"
    """Selects this kind."""

    answer_from: Literal["any", "boxed", "answer_line", "last_expression"] = "any"
    """Where the answer stands: "boxed" in the last \\boxed{}, "answer_line" behind the last "Answer:",
    "last_expression" where math-verify finds it at the response's end (behind "the final answer is", else the last
    formula or number); "any" takes the first of these three that there is."""


@config_class
class DapoMathTerm(TermConfig):
    """1 where the last "Answer:" line equals the reference answer under the rules of DAPO's verifier, else 0."""

    type: Literal["dapo_math"] = "dapo_math"
    """Selects this kind."""


@config_class
class PatternTermConfig(TermConfig):
    """What terms share that look for the answer with a pattern."""

    answer_pattern: str | None = None
    """Regular expression whose first group is the answer, the last match counting; it is searched in the response's
    last 10,000 characters. Null: the whole response, or where a numeric term looks by itself."""

    def __post_init__(self) -> None:
        """Check that the pattern is one."""
        TermConfig.__post_init__(self)
        if self.answer_pattern is not None:
            require_pattern(self.answer_pattern, field="answer_pattern", group_holds="the answer")


@config_class
class ExactMatchTerm(PatternTermConfig):
    """1 where the answer is the reference answer, without outer white space, else 0."""

    type: Literal["exact_match"] = "exact_match"
    """Selects this kind."""


@config_class
class NumericTerm(PatternTermConfig):
    """1 where the answer is a number near the reference answer, else 0."""

    type: Literal["numeric"] = "numeric"
    """Selects this kind."""

    relative_tolerance: float = 1e-6
    """Largest difference, as a fraction of the reference answer's size."""

    absolute_tolerance: float = 0.0
    """Largest difference in itself; the wider of the two tolerances counts."""

    def __post_init__(self) -> None:
        """Check ranges."""
        PatternTermConfig.__post_init__(self)
        for name in ("relative_tolerance", "absolute_tolerance"):
            value = getattr(self, name)
            require(
                0 <= value < math.inf,
                field=name,
                value=value,
                rule="must be finite and not negative",
                way_out="0 asks for the number itself",
            )


@config_class
class ReasoningGymTerm(PatternTermConfig):
    """1 where the score of the prompt's own reasoning-gym task reaches a threshold, else 0."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    """Selects this kind."""

    score_threshold: float = 0.99
    """A task's score at or above this counts as right."""

    def __post_init__(self) -> None:
        """Check ranges."""
        PatternTermConfig.__post_init__(self)
        require(
            0 < self.score_threshold <= 1,
            field="score_threshold",
            value=self.score_threshold,
            rule="must lie in (0, 1]",
            way_out="0.99 is a good value",
        )


@config_class
class PythonTerm(TermConfig):
    """The number that a function of yours returns."""

    type: Literal["python"] = "python"
    """Selects this kind."""

    function: str
    """package.module:function or path/to/file.py:function. It is called with those of these that it names: response,
    prompt, answer (the reference answer), metadata, finish_reason, num_tokens."""

    def __post_init__(self) -> None:
        """Check the form of the path."""
        TermConfig.__post_init__(self)
        module, colon, name = self.function.rpartition(":")
        require(
            bool(colon and module and name.isidentifier()),
            field="function",
            value=self.function,
            rule="must name a module or a file and a function in it",
            way_out="write package.module:function or path/to/file.py:function",
        )


@config_class
class OverlongTerm(TermConfig):
    """Soft penalty for long responses (DAPO, eq. 13): 0, then falling to −1 over the last tokens that are allowed."""

    type: Literal["overlong"] = "overlong"
    """Selects this kind."""

    buffer_tokens: int = 4096
    """Tokens before rollout.max_response_tokens over which the penalty grows; the weight is its greatest value."""

    def __post_init__(self) -> None:
        """Check ranges."""
        TermConfig.__post_init__(self)
        require(
            self.buffer_tokens >= 1,
            field="buffer_tokens",
            value=self.buffer_tokens,
            rule="must be at least 1",
            way_out="DAPO has 4096 of 20480",
        )


RewardTerm = MathTerm | DapoMathTerm | ExactMatchTerm | NumericTerm | ReasoningGymTerm | PythonTerm | OverlongTerm


def _default_terms() -> dict[str, RewardTerm]:
    return {"correct": ExactMatchTerm()}


@config_class
class RewardConfig:
    """The reward of a response: Σ weight × score of its terms."""

    terms: dict[str, RewardTerm] = field(default_factory=_default_terms)
    """Terms by name. The first one is the verdict: its score, without weight, is what accuracy means."""

    require_stop: bool = True
    """A response that did not end by itself (cut off by the token limit, say) gets 0 from every term but "overlong"."""

    on_error: Literal["fatal", "skip"] = "fatal"
    """When a term fails on a response (raises, hangs, gives no finite number): "fatal" ends the run with its id, "skip"
    takes the sample out of its group and counts it."""

    timeout_s: float = 5.0
    """Seconds that a term may take for one response: of processor time, and then the answer is wrong; for a python
    term of real time, and then it has failed."""

    max_workers: int = 8
    """Grading processes, started as they are needed."""

    worker_memory_gib: float = 4.0
    """Address space of a grading process, in GiB."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        require(
            bool(self.terms),
            field="terms",
            value=self.terms,
            rule="must name at least one term",
            way_out="write `terms: {correct: {type: math}}`",
        )
        for name in self.terms:
            require(
                _TERM_NAME.fullmatch(name) is not None,
                field="terms",
                value=name,
                rule="a term's name must be made of small letters, digits and underscores",
                way_out='"correct" is a good name for the verdict',
            )
        verdict, term = next(iter(self.terms.items()))
        require(
            not isinstance(term, OverlongTerm),
            field=f"terms.{verdict}.type",
            value=term.type,
            rule="the first term is the verdict on the answer, which a length is not",
            way_out="put the term that judges the answer first",
        )
        weights = {name: each.weight for name, each in self.terms.items()}
        require(
            any(weights.values()),
            field="terms",
            value=weights,
            rule="all weights are 0, so every reward would be",
            way_out="give the term that judges the answer the weight 1",
        )
        for name, low in (("timeout_s", 0.1), ("max_workers", 1), ("worker_memory_gib", 0.5)):
            value = getattr(self, name)
            require(
                low <= value < math.inf,
                field=name,
                value=value,
                rule=f"must be finite and at least {low}",
                way_out=f"{_default_of(name)} is a good value",
            )

    def check_response_limit(self, max_response_tokens: int) -> None:
        """Refuse penalties that begin before the response does.

        Raises:
            ConfigError: An over-long term's buffer is not shorter than the longest response.
        """
        for name, term in self.terms.items():
            if isinstance(term, OverlongTerm) and term.buffer_tokens >= max_response_tokens:
                raise ConfigError(
                    field=f"reward.terms.{name}.buffer_tokens",
                    value=term.buffer_tokens,
                    rule=f"must be below rollout.max_response_tokens = {max_response_tokens}",
                    way_out="a fifth of it is DAPO's choice",
                )


def _default_of(name: str) -> object:
    return RewardConfig.__dataclass_fields__[name].default
