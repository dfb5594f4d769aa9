"""The soft penalty on long responses."""

from dataclasses import dataclass

from megatron_fipo.rewards.base import Response, Verdict


@dataclass(frozen=True, slots=True)
class Overlong:
    """min(0, (L_max − L_buffer − L) / L_buffer) of a response of L tokens (DAPO, eq. 13, arXiv:2503.14476).

    Attributes:
        buffer_tokens: L_buffer.
        max_response_tokens: L_max.
    """

    buffer_tokens: int
    max_response_tokens: int

    def read_reference(self, response: Response) -> None:
        """No reference answer is needed."""

    def grade(self, response: Response) -> Verdict:
        """Judge one response, as `Term.grade`."""
        over = response.num_tokens - (self.max_response_tokens - self.buffer_tokens)
        return Verdict(-min(max(over, 0) / self.buffer_tokens, 1.0))

    def same_answer(self, first: str, second: str) -> bool:
        """There is no answer in a length; the text is compared."""
        return first == second
