from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.trainer.evaluation.files import EvaluationFiles
from megatron_fipo.trainer.evaluation.results import ProblemResult

CHUNKS = [2, 2, 1]
# Responses of each problem: one could not be scored.
RESPONSES = [3, 3, 2, 3, 3]


def result(number: int) -> ProblemResult:
    return ProblemResult(
        prompt_id=f"p:{number}",
        source="p",
        reference="\u00bd",
        num_samples=3,
        num_correct=0,
        num_unscored=3 - RESPONSES[number],
        num_truncated=0,
        response_length_mean=1.5,
        answers=(),
        majority_answer=None,
        consensus=0.0,
        greedy_correct=None,
        num_responses=RESPONSES[number],
    )


def write(folder: Path) -> list[tuple[int, int]]:
    """Write all chunks; returns both files' sizes after each."""
    files, number = EvaluationFiles(folder), 0
    sizes = [(0, 0)]
    for size in CHUNKS:
        results = [result(each) for each in range(number, number + size)]
        records = [
            {"prompt_id": each.prompt_id, "response": "\u00e4"} for each in results for _ in range(each.num_responses)
        ]
        files.append(results, records)
        number += size
        sizes.append((files.responses.stat().st_size, files.problems.stat().st_size))
    return sizes


@settings(max_examples=40)
@given(st.data())
def test_a_writer_killed_anywhere_leaves_its_finished_chunks(tmp_path_factory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("evaluation")
    sizes = write(folder)
    files = EvaluationFiles(folder)
    # Responses of a chunk are on disk before its problems are begun.
    chunk = data.draw(st.integers(0, len(CHUNKS) - 1))
    if data.draw(st.booleans()):
        kept = (data.draw(st.integers(sizes[chunk][0], sizes[chunk + 1][0])), sizes[chunk][1])
    else:
        kept = (sizes[chunk + 1][0], data.draw(st.integers(sizes[chunk][1], sizes[chunk + 1][1])))
    for path, size in zip((files.responses, files.problems), kept, strict=True):
        with path.open("r+b") as file:
            file.truncate(size)
    finished = chunk + (kept == sizes[chunk + 1])
    assert files.recover(CHUNKS) == [result(number) for number in range(sum(CHUNKS[:finished]))]
    assert (files.responses.stat().st_size, files.problems.stat().st_size) == sizes[finished]


def test_there_may_be_nothing_yet(tmp_path: Path) -> None:
    files = EvaluationFiles(tmp_path)
    assert files.recover(CHUNKS) == []
    assert files.responses.read_bytes() == files.problems.read_bytes() == b""


def test_a_chunk_without_its_responses_does_not_count(tmp_path: Path) -> None:
    sizes = write(tmp_path)
    files = EvaluationFiles(tmp_path)
    with files.responses.open("r+b") as file:
        file.truncate(sizes[2][0] - 1)
    assert len(files.recover(CHUNKS)) == CHUNKS[0]
