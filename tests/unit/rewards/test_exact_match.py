import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config.reward import ExactMatchTerm
from megatron_fipo.rewards.extraction import MAX_SEARCHED_CHARACTERS, find_by_pattern
from tests.unit.rewards.grading import grade, make_grader


def score(response: str, answer: str | None = "42", finish_reason: str = "stop", **term: Any) -> float:
    config = {"require_stop": term.pop("require_stop")} if "require_stop" in term else {}
    grader = make_grader({"correct": ExactMatchTerm(**term)}, **config)
    result = grade(grader, response, answer, finish_reason=finish_reason)
    assert result["reward"] == result["score"] == result["terms"]["correct"]
    assert type(result["score"]) is float
    return result["score"]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("42", "42", 1.0),
        (" 42\n", "42", 1.0),
        ("42", "\t42 ", 1.0),
        ("42.", "42", 0.0),
        ("the answer is 42", "42", 0.0),
        ("Yes", "yes", 0.0),
        ("", "42", 0.0),
        ("", "", 1.0),
        ("a  b", "a b", 0.0),
    ],
)
def test_whole_response(response: str, answer: str, expected: float) -> None:
    assert score(response, answer) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("so #### 42", 1.0),
        ("####42", 1.0),
        ("#### 41 no, #### 42", 1.0),
        ("#### 42 no, #### 41", 0.0),
        ("42", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_match_counts(response: str, expected: float) -> None:
    assert score(response, answer_pattern=r"####\s*(\d+)") == expected


def test_the_first_group_is_the_answer_without_outer_space() -> None:
    pattern = r"<(answer|result)>(.*?)</\1>"
    assert score("<answer> 42 </answer>", answer="answer", answer_pattern=pattern) == 1.0
    assert score("<answer> 42\n</answer>", answer_pattern=r"(?s)<answer>(.*?)</answer>") == 1.0


def test_a_group_that_took_no_part_is_no_answer() -> None:
    assert find_by_pattern("x 42 x", re.compile(r"(\d+)|x$")) is None


def test_only_the_end_of_a_long_response_is_searched() -> None:
    pattern = re.compile(r"#(\d+)")
    assert find_by_pattern("#42" + "." * (MAX_SEARCHED_CHARACTERS - 3), pattern) == "42"
    assert find_by_pattern("#42" + "." * (MAX_SEARCHED_CHARACTERS - 2), pattern) is None
    assert find_by_pattern("." * 10**6 + "#42", pattern) == "42"


def test_a_very_long_response_takes_no_time() -> None:
    start = time.perf_counter()
    # Quadratic on a text without "#": 10 s on these million characters, 1 ms on the end of them.
    assert score("1" * 1_000_000, answer_pattern=r"(\d)[^#]{0,5000}#") == 0.0
    assert time.perf_counter() - start < 5


@given(answer=st.text(min_size=1).filter(str.strip), around=st.text(alphabet=" \n\t", max_size=3))
def test_any_reference_matches_itself(answer: str, around: str) -> None:
    assert score(around + answer + around, answer) == 1.0
    assert score(answer + "x", answer) == 0.0


@pytest.mark.parametrize("finish_reason", ["length", "abort"])
def test_an_unfinished_response(finish_reason: str) -> None:
    assert score("42", finish_reason=finish_reason) == 0.0
    assert score("42", finish_reason=finish_reason, require_stop=False) == 1.0


def test_a_prompt_without_reference_is_no_zero() -> None:
    result = grade(make_grader({"correct": ExactMatchTerm()}), "42")
    assert result == {"failure": "reference", "term": "correct", "problem": "there is no reference answer"}


def test_answers_are_the_same_without_outer_space() -> None:
    grader = make_grader({"correct": ExactMatchTerm()})
    assert grader.same_answer("42 ", "42")
    assert not grader.same_answer("42", "42.0")
