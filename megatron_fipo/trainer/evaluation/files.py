"""The files of one evaluation: a line for every response, a line for every problem."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.runtime.files.json_files import append_lines, read_whole_lines
from megatron_fipo.trainer.evaluation.results import ProblemResult


class EvaluationFiles:
    """responses.jsonl and problems.jsonl, to which whole chunks of problems are added.

    A chunk counts once its last problem's line is on disk; its responses are there before. So a killed writer leaves at
    most one chunk that does not count.

    Args:
        folder: Where they lie; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.responses, self.problems = folder / "responses.jsonl", folder / "problems.jsonl"

    def append(self, results: Sequence[ProblemResult], records: Sequence[Mapping[str, Any]]) -> None:
        """Add a chunk.

        Args:
            results: What came of its problems.
            records: All their responses.
        """
        append_lines(self.responses, records)
        append_lines(self.problems, [result.to_json() for result in results])

    def recover(self, chunk_sizes: Sequence[int]) -> list[ProblemResult]:
        """Cut both files back to their finished chunks.

        Args:
            chunk_sizes: Problems of every chunk, in order.

        Returns:
            What came of the problems of the finished chunks.
        """
        for path in (self.responses, self.problems):
            path.touch()
        lines, problem_ends = read_whole_lines(self.problems)
        _, response_ends = read_whole_lines(self.responses)
        results = [ProblemResult.from_json(fields) for fields in lines]
        num_problems = num_responses = 0
        for size in chunk_sizes:
            chunk = results[num_problems : num_problems + size]
            responses = num_responses + sum(result.num_responses for result in chunk)
            if len(chunk) < size or responses > len(response_ends):
                break
            num_problems, num_responses = num_problems + size, responses
        _cut(self.problems, problem_ends, num_problems)
        _cut(self.responses, response_ends, num_responses)
        return results[:num_problems]


def _cut(path: Path, ends: Sequence[int], count: int) -> None:
    with path.open("r+b") as file:
        file.truncate(ends[count - 1] if count else 0)
