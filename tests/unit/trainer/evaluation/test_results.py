"""What is made of responses: classes of equal answers, the numbers of a problem, and those of an evaluation."""

import asyncio
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.evaluation_table import evaluation_table
from megatron_fipo.trainer.evaluation.results import (
    AnswerClass,
    ProblemResult,
    evaluation_metrics,
    problem_results,
    response_records,
)
from megatron_fipo.types import Prompt, RolloutGroup, Sample

STORED = Path(__file__).with_name("stored_responses.json")


class Compared:
    """Compares answers as numbers, and keeps what it was asked."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    async def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self.pairs += pairs
        return [Fraction(first) == Fraction(second) for first, second in pairs]


def sample(index: int, answer: str | None, score: float, length: int = 3) -> Sample:
    return Sample(
        prompt_id="p",
        sample_index=index,
        response_token_ids=np.zeros(length, dtype=np.int32),
        rollout_log_probs=np.zeros(length, dtype=np.float32),
        finish_reason="stop" if answer is not None else "length",
        policy_version=0,
        response_text=f"so {answer}",
        # What shaping makes of it must play no part.
        reward=score - 0.7,
        score=score,
        answer=answer,
    )


def group(number: int, source: str, reference: str, samples: list[tuple[str | None, float]]) -> RolloutGroup:
    ids = np.zeros(2, dtype=np.int32)
    prompt = Prompt(id=f"{source}:{number}", token_ids=ids, text="?", answer=reference, source=source)
    return RolloutGroup(prompt=prompt, samples=[sample(index, *each) for index, each in enumerate(samples)])


def stored_groups() -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    rows = json.loads(STORED.read_text())
    groups = [group(place, row["source"], row["reference"], row["samples"]) for place, row in enumerate(rows)]
    greedy = [group(place, row["source"], row["reference"], [row["greedy"]]) for place, row in enumerate(rows)]
    return groups, greedy


def judge(groups: list[RolloutGroup], greedy: Sequence[RolloutGroup] = (), num_samples: int = 4) -> list[ProblemResult]:
    return asyncio.run(problem_results(groups, greedy, num_samples, Compared()))


def test_stored_responses_give_the_numbers_computed_by_hand() -> None:
    """Four problems, four samples each (R right, W wrong, - no answer), equal numbers being equal answers.

    algebra 1:  0.5 R, 2 W, 1/2 R, 2 W.  c = 2. Classes {0.5, 1/2}: 2, right; {2}: 2, wrong.
        Avg@4 = 2/4.  Cons@4: a tie, 1/2.  Pass@2 = 1 - C(2,2)/C(4,2) = 5/6.  Pass@4 = 1.
        Cons@2: of 6 pairs RR 1, WW 0, and four ties RW 1/2: (1 + 4/2) / 6 = 1/2.
    algebra 2:  7 R, 8 W, 8 W, -.  c = 1. Classes {8}: 2, {7}: 1.
        Avg@4 = 1/4.  Cons@4 = 0.  Pass@2 = 1 - C(3,2)/C(4,2) = 1/2.  Pass@4 = 1.
        Cons@2: pairs 78, 78 tie 1/2 each; 7- 1; 88, 8-, 8- 0: 2/6 = 1/3.
    counting 1: four without an answer: all 0.
    counting 2: 3 R, 5 W, 3 R, 3 R.  c = 3.
        Avg@4 = 3/4.  Cons@4 = 1.  Pass@2 = 1.  Pass@4 = 1.
        Cons@2: three pairs 33, three ties 35: (3 + 3/2) / 6 = 3/4.
    """
    groups, greedy = stored_groups()
    results = judge(groups, greedy)
    assert [result.consensus for result in results] == [1 / 2, 0.0, 0.0, 1.0]
    config = EvaluationConfig(samples_per_problem=4, pass_at=(2,), consensus_at=(2,))
    metrics = evaluation_metrics(results, config, seed=0)
    expected = {
        "eval/num_problems": 4,
        "eval/num_unscored": 0,
        "eval/accuracy": (2 / 4 + 1 / 4 + 0 + 3 / 4) / 4,
        "eval/greedy_accuracy": 2 / 4,
        "eval/response_length_mean": 3,
        "eval/truncated_fraction": (0 + 1 / 4 + 1 + 0) / 4,
        "eval/algebra/num_problems": 2,
        "eval/algebra/avg_at_4": (2 / 4 + 1 / 4) / 2,
        "eval/algebra/cons_at_2": (1 / 2 + 1 / 3) / 2,
        "eval/algebra/cons_at_4": (1 / 2 + 0) / 2,
        "eval/algebra/pass_at_2": (5 / 6 + 1 / 2) / 2,
        "eval/algebra/pass_at_4": 1,
        "eval/algebra/greedy_accuracy": 1 / 2,
        "eval/algebra/response_length_mean": 3,
        "eval/algebra/truncated_fraction": 1 / 8,
        "eval/counting/num_problems": 2,
        "eval/counting/avg_at_4": (0 + 3 / 4) / 2,
        "eval/counting/cons_at_2": (0 + 3 / 4) / 2,
        "eval/counting/cons_at_4": (0 + 1) / 2,
        "eval/counting/pass_at_2": (0 + 1) / 2,
        "eval/counting/pass_at_4": (0 + 1) / 2,
        "eval/counting/greedy_accuracy": 1 / 2,
        "eval/counting/response_length_mean": 3,
        "eval/counting/truncated_fraction": 1 / 2,
    }
    limits = {key for key in metrics if key.endswith(("_low", "_high"))}
    assert {key: value for key, value in metrics.items() if key not in limits} == pytest.approx(expected, abs=1e-12)
    for key in limits:
        name, _, end = key.rpartition("_")
        assert metrics[key] <= metrics[name] + 1e-12 if end == "low" else metrics[key] >= metrics[name] - 1e-12
    assert CATALOGUE.undeclared(metrics) == []


def test_a_problem_keeps_its_answers_with_counts() -> None:
    groups, greedy = stored_groups()
    first, second, third, _ = judge(groups, greedy)
    assert first.answers == (
        AnswerClass(answer="2", count=2, correct=False),
        AnswerClass(answer="0.5", count=2, correct=True),
    )
    assert (second.num_samples, second.num_correct, second.num_truncated, second.majority_answer) == (4, 1, 1, "8")
    assert (third.answers, third.majority_answer, third.greedy_correct) == ((), None, False)
    assert [judged.greedy_correct for judged in judge(groups)] == [None] * 4
    assert ProblemResult.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_spellings_are_compared_once_for_all_problems_and_joined_in_chains() -> None:
    compared = Compared()
    answers = [("1/2", 1.0), ("0.5", 1.0), ("1", 0.0), ("2/4", 1.0), ("1.0", 0.0)]
    groups = [group(number, "a", "1/2", list(answers)) for number in range(3)]
    results = asyncio.run(problem_results(groups, [], 5, compared))
    assert len(compared.pairs) == len(set(compared.pairs)) == 10
    for result in results:
        assert [(each.answer, each.count, each.correct) for each in result.answers] == [
            ("1/2", 3, True),
            ("1", 2, False),
        ]


def test_comparisons_of_a_problem_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two most frequent spellings are still compared; the third stays apart."""
    monkeypatch.setattr("megatron_fipo.trainer.evaluation.results.MAX_COMPARISONS", 1)
    answers: list[tuple[str | None, float]] = [("3", 0.0), ("4/2", 1.0), ("4/2", 1.0), ("2", 1.0), ("2", 1.0)]
    (result,) = judge([group(0, "a", "2", answers)], num_samples=5)
    assert [(each.answer, each.count) for each in result.answers] == [("4/2", 4), ("3", 1)]


def test_an_answer_is_right_where_a_sample_that_gave_it_was_scored_so() -> None:
    """A response that was cut off scores 0 with reward.require_stop, and still votes for its answer."""
    (result,) = judge([group(0, "a", "5", [("5", 0.0), ("5", 1.0), ("6", 0.0)])], num_samples=3)
    assert (result.num_correct, result.consensus) == (1, 1.0)


def test_responses_without_a_score_count_as_wrong_and_are_counted() -> None:
    short = group(0, "a", "5", [("5", 1.0)])
    empty = group(1, "a", "5", [])
    results = judge([short, empty], [empty, empty], num_samples=2)
    assert [(each.num_samples, each.num_correct, each.num_unscored) for each in results] == [(2, 1, 1), (2, 0, 2)]
    assert [each.greedy_correct for each in results] == [False, False]
    metrics = evaluation_metrics(results, EvaluationConfig(samples_per_problem=2), seed=0)
    assert (metrics["eval/accuracy"], metrics["eval/num_unscored"]) == (1 / 4, 3)
    assert math.isfinite(sum(metrics.values()))


def test_every_response_has_a_record() -> None:
    groups, greedy = stored_groups()
    results = judge(groups, greedy)
    records = response_records(groups, greedy)
    assert len(records) == 4 * 5 == sum(result.num_responses for result in results)
    assert records[1] == {
        "prompt_id": "algebra:0",
        "source": "algebra",
        "sample_index": 1,
        "greedy": False,
        "answer": "2",
        "score": 0.0,
        "finish_reason": "stop",
        "response_tokens": 3,
        "response": "so 2",
    }
    assert [record["greedy"] for record in records[:5]] == [False] * 4 + [True]


def test_one_sample_has_an_average_alone() -> None:
    groups, _ = stored_groups()
    for each in groups:
        del each.samples[1:]
    metrics = evaluation_metrics(judge(groups, num_samples=1), EvaluationConfig(greedy=False), seed=0)
    assert {key for key in metrics if key.startswith("eval/algebra/")} == {
        *("eval/algebra/num_problems", "eval/algebra/response_length_mean", "eval/algebra/truncated_fraction"),
        *("eval/algebra/avg_at_1", "eval/algebra/avg_at_1_low", "eval/algebra/avg_at_1_high"),
    }


def test_resampling_the_samples_widens_the_averages_interval_alone() -> None:
    results = judge(stored_groups()[0])
    fields = {"samples_per_problem": 4, "greedy": False}
    plain = evaluation_metrics(results, EvaluationConfig(**fields), seed=0)
    nested = evaluation_metrics(results, EvaluationConfig(**fields, interval="problems_and_samples"), seed=0)
    differing = {key for key in plain if plain[key] != nested[key]}
    assert {key.rpartition("_")[0] for key in differing} == {
        *("eval/accuracy", "eval/algebra/avg_at_4", "eval/counting/avg_at_4")
    }
    widths = [metrics["eval/accuracy_high"] - metrics["eval/accuracy_low"] for metrics in (plain, nested)]
    assert widths[0] < widths[1]


def test_the_table_has_a_row_for_every_source_and_one_for_all() -> None:
    groups, greedy = stored_groups()
    config = EvaluationConfig(samples_per_problem=4, pass_at=(2,))
    table = evaluation_table(evaluation_metrics(judge(groups, greedy), config, seed=0))
    rows = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in table]
    assert rows[0] == ["source", "problems", "avg@4", "cons@4", "pass@2", "pass@4", "greedy", "tokens", "cut off"]
    assert [row[:2] for row in rows[1:]] == [["algebra", "2"], ["counting", "2"], ["all", "4"]]
    assert [row[2].split()[0] for row in rows[1:]] == ["0.375", "0.375", "0.375"]
    assert [row[5].split()[0] for row in rows[1:]] == ["1.000", "0.500", "-"]
    assert rows[1][-2:] == ["3.0", "12.5%"]
