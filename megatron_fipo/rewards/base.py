"""What a term is given and what it gives back. Grading processes import this, so it imports no library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_fipo.runtime.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response with its prompt, as terms see it.

    Attributes:
        text: The decoded response, without its stop token.
        finish_reason: "stop", "length" or "abort".
        num_tokens: Response tokens, the stop token included.
        prompt: The prompt's text.
        reference: The reference answer, where the prompt has one.
        metadata: What else the prompt's source tells.
    """

    text: str
    finish_reason: str = "stop"
    num_tokens: int = 0
    prompt: str = ""
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A term's opinion of one response.

    Attributes:
        score: Before the weight.
        answer: The answer that was judged; None where none was found.
    """

    score: float
    answer: str | None = None


class Term(Protocol):
    """Judges responses."""

    def read_reference(self, response: Response) -> None:
        """Read the reference answer, so that trouble with it is not taken for trouble with the answer.

        Raises:
            BadReferenceError: It cannot be read.
        """
        ...

    def grade(self, response: Response) -> Verdict:
        """Judge one response; any text gets a verdict."""
        ...

    def same_answer(self, first: str, second: str) -> bool:
        """Whether two answers, as found in responses, are the same one."""
        ...


class BadReferenceError(ValueError):
    """The reference answer of a prompt cannot be used: a defect of the data row."""


class RewardError(RunError):
    """A response without a reward.

    Attributes:
        sample_id: `prompt_id#index`.
        problem: What happened.
    """

    def __init__(self, sample_id: str, problem: str) -> None:
        super().__init__(sample_id, problem)
        self.sample_id = sample_id
        self.problem = problem

    def __str__(self) -> str:
        return f"reward of {self.sample_id}: {self.problem}"


def required_reference(response: Response) -> str:
    """The reference answer, without outer white space.

    Raises:
        BadReferenceError: There is none.
    """
    if response.reference is None or not response.reference.strip():
        raise BadReferenceError("there is no reference answer")
    return response.reference.strip()
