"""Mathematical answers: where they stand, when they are equal, and what never reaches the parser."""

import asyncio
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_fipo.config.reward import MathTerm, RewardConfig
from megatron_fipo.rewards.base import Response
from megatron_fipo.rewards.extraction import MAX_SEARCHED_CHARACTERS, find_answer_line, find_boxed
from megatron_fipo.rewards.pool import RewardPool, Score, ScoreFailure, ScoreJob
from megatron_fipo.rewards.screens import MAX_BRACKET_DEPTH, is_hostile, is_screened
from tests.unit.rewards.grading import grade, make_grader

pytest.importorskip("math_verify", reason="an extra of the package")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    config = RewardConfig(terms={"correct": MathTerm()}, timeout_s=1.0, max_workers=1)
    with RewardPool(config, max_response_tokens=100) as opened:
        yield opened


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("so \\boxed{34}", "34", True),
        ("so \\boxed{34.0}", "34", True),
        ("so \\boxed{35}", "34", False),
        ("\\boxed{35} no, \\boxed{34}", "34", True),
        ("\\boxed{34} no, \\boxed{35}", "34", False),
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True),
        ("\\boxed{0.5}", "1/2", True),
        ("\\boxed{\\frac{\\sqrt{12}}{2}}", "$\\sqrt{3}$", True),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2", True),
        ("\\boxed{x=5}", "5", True),
        ("\\boxed{(1, 2)}", "(1,2)", True),
        ("\\boxed{(2, 1)}", "(1,2)", False),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", True),
        ("\\boxed{1,234}", "1234", True),
        ("\\boxed{50\\%}", "50", True),
        ("\\boxed{50\\%}", "\\frac{1}{2}", True),
        ("\\boxed{0.5}", "50\\%", True),
        ("\\boxed{2**3}", "8", True),
        ("\\boxed{\\text{Tuesday}}", "Tuesday", True),
        ("\\boxed{12 \\text{ apples}}", "12", True),
        ("\\boxed{}", "34", False),
        ("\\boxed{34", "34", False),
        ("Answer: 34", "34", True),
        ("**Answer:** $\\frac12$.", "1/2", True),
        ("Answer: 33\nno\nAnswer: 34", "34", True),
        ("Answer: 34\n\\boxed{35}", "34", False),
        ("The sum is 30 + 4 = 34.", "34", True),
        ("It is $x = 34$", "34", True),
        ("I do not know", "34", False),
        ("", "34", False),
    ],
)
def test_verdicts(pool: RewardPool, response: str, reference: str, right: bool) -> None:
    (outcome,) = pool.submit([ScoreJob("p#0", Response(text=response, reference=reference))]).result(timeout=60)
    assert isinstance(outcome, Score)
    assert outcome.score == outcome.reward == float(right)
    assert not outcome.timed_out


@pytest.mark.parametrize(
    ("answer_from", "response", "found"),
    [
        ("any", "It is 3. \\boxed{1}\nAnswer: 2", "1"),
        ("boxed", "It is 3. \\boxed{1}\nAnswer: 2", "1"),
        ("answer_line", "It is 3. \\boxed{1}\nAnswer: 2", "2"),
        ("last_expression", "From 1 and $y=2$ we get 3.", "3"),
        ("last_expression", "The final answer is 1. That took 2 lines.", "1"),
    ],
)
def test_where_the_answer_stands(answer_from: Any, response: str, found: str) -> None:
    grader = make_grader({"correct": MathTerm(answer_from=answer_from)})
    result = grade(grader, response, found)
    assert (result["answer"], result["score"]) == (found, 1.0)
    assert grade(grader, "nothing", found)["answer"] is None


def test_the_last_box_that_closes() -> None:
    assert find_boxed("\\boxed{a{b}\\}c} and \\boxed{open") == "a{b}\\}c"
    assert find_boxed("\\boxed{1}" + "\\boxed{" * 5) == "1"
    assert find_boxed("boxed{1}") is None
    assert find_boxed("\\boxed{1}" + "." * MAX_SEARCHED_CHARACTERS) is None


def test_the_last_answer_line() -> None:
    assert find_answer_line("answer : 1\nANSWER: **2**.\n") == "2"
    assert find_answer_line("The answer is 3") is None


@pytest.mark.parametrize("reference", ["", "  ", "((((", "\\frac{1}{", "9^9^9^9", "2" * 2_000])
def test_a_reference_that_cannot_be_parsed_is_an_error_of_the_row(reference: str) -> None:
    result = grade(make_grader({"correct": MathTerm()}), "\\boxed{1}", reference)
    assert result["failure"] == "reference"
    assert "the reference answer" in result["problem"] or result["problem"] == "there is no reference answer"


def test_same_answers(pool: RewardPool) -> None:
    pairs = [("1/2", "0.5"), ("x", "x"), ("1", "2"), ("9^9^9^9", "9^9^9^9 "), ("x=3", "3"), ("((", "((")]
    assert asyncio.run(pool.same_answer(pairs)) == [True, True, False, False, True, True]


SCREENED = [
    "9^9^9^9",
    "9**9**9",
    "2^{3^{9}}",
    "x^x^x^x^x",
    "(((9^{99})^{99})^{99})",
    "10^{100000}",
    "2^{-100000}",
    "100000!",
    "((3!)!)!",
    "\\binom{100000}{5}",
    "(" * (MAX_BRACKET_DEPTH + 1),
    "\\frac{" * (MAX_BRACKET_DEPTH + 1),
    "1" * 301,
    "1," * 101,
    "x" * 1_001,
    "1\x00",
    "\ud800",
]


@pytest.mark.parametrize("answer", SCREENED)
def test_hostile_answers_are_wrong_without_a_parser(answer: str) -> None:
    assert is_hostile(answer)


@pytest.mark.parametrize(
    "answer",
    ["2^{2024}-1", "e^{x^2}", "x^{y^{z}}", "2^{2^{10}}", "x^2y^3z^4", "2024!", "\\binom{2024}{1012}", "10^{-30}"]
    + ["(" * MAX_BRACKET_DEPTH, "1" * 300, "1," * 100, "x" * 1_000, "x^{10}+x^{9}+x^{8}", "naïve\n½", "((2^3)^4)^5"],
)
def test_answers_that_may_be_right_pass_the_screens(answer: str) -> None:
    assert not is_hostile(answer)


def test_the_question_is_no_answer_unless_the_reference_is_one_too() -> None:
    for question in ("\\int_0^1 x dx", "\\sum_{k=1}^3 k", "\\lim_{x\\to0} x", "Integral(x, x)", "\\frac{d}{dx} x^2"):
        assert is_screened(question, "\\frac12")
        assert not is_screened(question, question)
    assert not is_screened("\\integer", "1")
    assert grade(make_grader({"correct": MathTerm()}), "\\boxed{\\int_0^1 x dx}", "\\frac12")["score"] == 0.0


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_grading", ROOT / "tools" / "benchmark_grading.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hostile_answers_cost_bounded_time_and_no_pool(pool: RewardPool) -> None:
    benchmark = load_benchmark()
    jobs = list(benchmark.hostile_jobs(58))
    start = time.perf_counter()
    outcomes = pool.submit(jobs).result(timeout=120)
    # Six of the 29 kinds may take their whole second.
    assert time.perf_counter() - start < 60
    assert not [outcome for outcome in outcomes if isinstance(outcome, ScoreFailure)]
    assert [outcome.score for outcome in outcomes if isinstance(outcome, Score)] == [0.0] * 58
    ordinary = benchmark.ordinary_jobs(60)
    pooled = pool.submit(ordinary).result(timeout=60)
    inline, _ = benchmark.grade_inline(ordinary)
    assert 0 < sum(inline) < 60
    assert [outcome.score for outcome in pooled if isinstance(outcome, Score)] == inline
