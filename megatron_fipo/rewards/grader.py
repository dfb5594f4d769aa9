"""Grades one response after the other, as a grading process does."""

import ast
import functools
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from megatron_fipo.config.reward import (
    DapoMathTerm,
    ExactMatchTerm,
    MathTerm,
    NumericTerm,
    OverlongTerm,
    PythonTerm,
    ReasoningGymTerm,
    RewardConfig,
    RewardTerm,
)
from megatron_fipo.rewards.base import BadReferenceError, Response, Term, Verdict
from megatron_fipo.rewards.time_limit import TimeLimitError, time_limit

Json = dict[str, Any]
FailureKind = Literal["reference", "raised", "not_finite", "ended"]
"""What a failure is: "reference" (a defect of the data row), "raised", "not_finite", or "ended" (hung, or its process
died)."""

_CONFIGS: dict[str, type[RewardTerm]] = {
    kind.__dataclass_fields__["type"].default: kind for kind in get_args(RewardTerm)
}
_REMEMBERED_REFERENCES = 1_000


@dataclass(frozen=True, slots=True)
class _NamedTerm:
    name: str
    config: RewardTerm
    term: Term

    def weighted(self, verdict: Verdict) -> float:
        """What the verdict adds to the reward."""
        return self.config.weight * verdict.score


class _GradingError(Exception):
    """A response that has no reward; the arguments are the failure's kind and its text."""


class Grader:
    """All terms of a reward.

    Args:
        terms: Name → fields of its configuration, as `describe_terms` gives them.
        require_stop: An unfinished response gets 0 from every term but the over-long one.
        timeout_s: Seconds of a term.
        max_response_tokens: Longest response.
        announce: Called before work that may be slow, with "term" or "reference" and the term's name.

    Raises:
        ConfigError: A python term's function cannot be used.
    """

    def __init__(
        self,
        terms: dict[str, Json],
        *,
        require_stop: bool,
        timeout_s: float,
        max_response_tokens: int,
        announce: Callable[[str, str], None],
    ) -> None:
        self._require_stop, self._timeout_s, self._announce = require_stop, timeout_s, announce
        self._terms = []
        for name, fields in terms.items():
            config = _CONFIGS[fields["type"]](**fields)
            self._terms.append(_NamedTerm(name, config, _build_term(config, name, max_response_tokens)))
        self._references: dict[tuple[str, str | None], str | None] = {}

    def grade(self, job: Json) -> Json:
        """Grade one response.

        Args:
            job: Fields of `Response`, `metadata` as the text of a Python literal, and `given_up`: names of terms that
                count as wrong without being asked.

        Returns:
            `score`, `reward`, `terms`, `answer` and `timed_out`; or `failure` (its kind), `term` and `problem`.
        """
        fields = dict(job)
        given_up = set(fields.pop("given_up"))
        response = Response(**fields | {"metadata": _read_literal(fields["metadata"])})
        verdicts: list[Verdict] = []
        for named in self._terms:
            try:
                verdicts.append(self._judge(named, response, given_up))
            except _GradingError as error:
                kind, problem = error.args
                return {"failure": kind, "term": named.name, "problem": problem[:1000]}
        weighted = {named.name: named.weighted(verdict) for named, verdict in zip(self._terms, verdicts, strict=True)}
        reward = sum(weighted.values())
        if not math.isfinite(reward):
            return {"failure": "not_finite", "term": "the sum", "problem": f"{reward} is not a finite number"}
        return {
            "score": verdicts[0].score,
            "reward": reward,
            "terms": weighted,
            "answer": verdicts[0].answer,
            "timed_out": bool(given_up),
        }

    def same_answer(self, first: str, second: str) -> bool:
        """Whether two answers are the same to the first term; no, where that takes too long."""
        try:
            with time_limit(self._timeout_s):
                return self._terms[0].term.same_answer(first, second)
        except MemoryError:
            raise
        except (Exception, TimeLimitError):
            return False

    def _judge(self, named: _NamedTerm, response: Response, given_up: set[str]) -> Verdict:
        """A term's verdict; adds the term to `given_up` where its time is over."""
        unfinished = self._require_stop and response.finish_reason != "stop"
        if (unfinished and not isinstance(named.config, OverlongTerm)) or named.name in given_up:
            return Verdict(0.0)
        try:
            verdict = self._ask(named, response)
        except TimeLimitError:
            given_up.add(named.name)
            return Verdict(0.0)
        except BadReferenceError as error:
            raise _GradingError("reference", str(error)) from None
        except MemoryError:
            # Whose memory it was cannot be told in here: the process ends, and another one tries again.
            raise
        except (Exception, SystemExit) as error:
            raise _GradingError("raised", f"{type(error).__name__}: {error}") from None
        if not math.isfinite(verdict.score):
            raise _GradingError("not_finite", f"{verdict.score} is not a finite number")
        return verdict

    def _ask(self, named: _NamedTerm, response: Response) -> Verdict:
        if isinstance(named.config, PythonTerm):
            # No alarm, which could strike in the middle of what the function must not leave half done: a function that
            # takes too long is ended with its process.
            self._announce("term", named.name)
            return named.term.grade(response)
        self._read_reference(named, response)
        if len(self._terms) > 1 and not isinstance(named.config, OverlongTerm):
            self._announce("term", named.name)
        with time_limit(self._timeout_s):
            return named.term.grade(response)

    def _read_reference(self, named: _NamedTerm, response: Response) -> None:
        """Let the term read the reference answer, each of them once."""
        key = (named.name, response.reference)
        if key not in self._references:
            self._announce("reference", named.name)
            problem = None
            try:
                with time_limit(self._timeout_s):
                    named.term.read_reference(response)
            except BadReferenceError as error:
                problem = str(error)
            except TimeLimitError:
                problem = f"reading the reference answer takes more than {self._timeout_s:g} s"
            if len(self._references) >= _REMEMBERED_REFERENCES:
                self._references.clear()
            self._references[key] = problem
        if (problem := self._references[key]) is not None:
            raise BadReferenceError(problem)


def describe_terms(config: RewardConfig) -> dict[str, Json]:
    """Terms of a reward as plain values, in their order."""
    return {name: asdict(term) for name, term in config.terms.items()}


@functools.lru_cache(maxsize=256)
def _read_literal(text: str) -> Any:
    return ast.literal_eval(text)


def _build_term(config: RewardTerm, name: str, max_response_tokens: int) -> Term:
    """The term that a configuration describes; libraries are imported only for what needs them."""
    match config:
        case MathTerm():
            from megatron_fipo.rewards.math_answer import MathAnswer

            return MathAnswer(config.answer_from)
        case DapoMathTerm():
            from megatron_fipo.rewards.dapo_math import DapoMath

            return DapoMath()
        case ExactMatchTerm():
            from megatron_fipo.rewards.exact_match import ExactMatch

            return ExactMatch(_compile(config.answer_pattern))
        case NumericTerm():
            from megatron_fipo.rewards.numeric import Numeric

            return Numeric(_compile(config.answer_pattern), config.relative_tolerance, config.absolute_tolerance)
        case ReasoningGymTerm():
            from megatron_fipo.rewards.reasoning_gym import ReasoningGym

            return ReasoningGym(_compile(config.answer_pattern), config.score_threshold)
        case PythonTerm():
            from megatron_fipo.rewards.python_function import PythonFunction

            return PythonFunction.load(config.function, f"reward.terms.{name}.function")
        case OverlongTerm():
            from megatron_fipo.rewards.overlong import Overlong

            return Overlong(config.buffer_tokens, max_response_tokens)


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    return None if pattern is None else re.compile(pattern)
