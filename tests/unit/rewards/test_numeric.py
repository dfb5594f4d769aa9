from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config.reward import NumericTerm
from megatron_fipo.rewards.numeric import read_number
from tests.unit.rewards.grading import grade, make_grader


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("34", 34),
        ("-34", -34),
        ("+34", 34),
        ("- 34", -34),
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1,234,567.25", Fraction(4938269, 4)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("50%", Fraction(1, 2)),
        ("50 \\%", Fraction(1, 2)),
        ("$5", 5),
        ("$5$", 5),
        ("\\$5.20", Fraction(26, 5)),
        (" 7 \n", 7),
        ("1/0", None),
        ("12,34", None),
        ("1,2345", None),
        ("1e1000", None),
        ("9" * 101, None),
        ("1 2", None),
        ("x", None),
        ("3x", None),
        ("", None),
        ("nan", None),
        ("1/2/3", None),
        ("٣", None),
    ],
)
def test_numbers(text: str, number: Fraction | int | None) -> None:
    assert read_number(text) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_any_decimal_is_read_with_and_without_separators(number: object) -> None:
    assert read_number(f"{number}") == read_number(f"{number:,}") == Fraction(str(number))


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        ("\\boxed{34}", "34", 1.0),
        ("Answer: $1,234", "1234.0", 1.0),
        ("It costs 12 dollars, not 13.", "13", 1.0),
        ("It is 13 or 14", "13", 0.0),
        ("\\boxed{x} is 34", "34", 0.0),
        ("0.3333333", "1/3", 1.0),
        ("0.33", "1/3", 0.0),
        ("50%", "0.5", 1.0),
        ("50%", "50", 0.0),
        ("from 3-4 to 5", "5", 1.0),
        ("abc123", "123", 0.0),
        ("nothing", "34", 0.0),
        ("1" * 10**6, "34", 0.0),
        ("1," * 10**6, "34", 0.0),
        (" " * 10**6, "34", 0.0),
        ("- $ " * 10**5, "34", 0.0),
    ],
)
def test_responses(response: str, reference: str, score: float) -> None:
    assert grade(make_grader({"correct": NumericTerm()}), response, reference)["score"] == score


def test_tolerances_and_the_pattern() -> None:
    loose = make_grader(
        {"correct": NumericTerm(relative_tolerance=0.1, absolute_tolerance=2.0, answer_pattern="=(.*)")}
    )
    verdicts = [
        grade(loose, f"1 ={answer}", reference)["score"]
        for answer, reference in [("3", "1"), ("3.1", "1"), ("110", "100"), ("110.1", "100"), ("-2", "0"), ("x", "0")]
    ]
    assert verdicts == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    exact = make_grader({"correct": NumericTerm(relative_tolerance=0.0)})
    assert grade(exact, "0.1", "1/10")["score"] == 1.0
    assert grade(exact, "0.10000000000000000000001", "1/10")["score"] == 0.0
    assert exact.same_answer("1/2", "0.5") and not exact.same_answer("x", "x")


def test_a_reference_that_is_no_number_is_an_error_of_the_row() -> None:
    failure = grade(make_grader({"correct": NumericTerm()}), "1", "one")
    assert failure == {"failure": "reference", "term": "correct", "problem": "the reference answer 'one' is no number"}
