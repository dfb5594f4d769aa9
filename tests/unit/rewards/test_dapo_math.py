"""DAPO's rules, each with what it does to an answer."""

import pytest

from megatron_fipo.config.reward import DapoMathTerm
from megatron_fipo.rewards.dapo_math import SEARCHED_CHARACTERS, normalise
from tests.unit.rewards.grading import grade, make_grader


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("34", "34"),
        (" x = 34 ", "34"),
        ("a=b=3", "3"),
        ("1,234,567", "1234567"),
        ("1,234.5", "1,234.5"),
        ("(1, 2)", "(1,2)"),
        ("$\\frac12$", "\\frac{1}{2}"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\fracabc", "\\frac{a}{b}c"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("\\sqrt{2}", "\\sqrt{2}"),
        ("the $x+1$ and $x-1$", "x+1"),
        ("\\boxed{7}", "7"),
        ("\\text{Tuesday}", "Tuesday"),
        ("\\mbox{yes}", "yes"),
        ("\\textbf{(B)}", "(B)"),
        ("\\overline{AB}", "AB"),
        ("12 km", "12"),
        ("5\\text{ cm}^2", "5"),
        ("12 dollars", "12"),
        ("\\$18.90", "18.90"),
        ("90^\\circ", "90"),
        ("90^{\\circ}", "90"),
        ("10{,}000", "10000"),
        ("3\\text{ and }4", "34"),
        ("3,\\text{and}4", "34"),
        ("4\\mathrm{th}", "4"),
        ("34.", "34."),
        ("50\\%", "50\\%"),
        ("0034", "0034"),
        ("", ""),
    ],
)
def test_normalisation(answer: str, normalised: str) -> None:
    assert normalise(answer) == normalised


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("Answer: 34", "34", 1.0),
        ("answer : $34$", "34", 1.0),
        ("Answer:\n34", "34", 1.0),
        ("Answer: 33\nAnswer: 34", "34", 1.0),
        ("Answer: 34\nAnswer: 33", "33", 0.0),
        ("Answer: 34.0", "34.0", 0.0),
        ("Answer: \\boxed{34}", "34", 1.0),
        ("\\boxed{34}", None, 0.0),
        ("The answer is 34", None, 0.0),
        ("Answer:", None, 0.0),
        ("Answer: 34" + "." * (SEARCHED_CHARACTERS - 10), None, None),
        ("Answer: 34" + "." * (SEARCHED_CHARACTERS - 9), None, 0.0),
    ],
)
def test_the_last_answer_line_of_the_last_characters(response: str, answer: str | None, score: float | None) -> None:
    result = grade(make_grader({"correct": DapoMathTerm()}), response, "34")
    if score is None:
        assert result["answer"].startswith("34...")
    else:
        assert (result["answer"], result["score"]) == (answer, score)


def test_both_sides_are_normalised() -> None:
    grader = make_grader({"correct": DapoMathTerm()})
    assert grade(grader, "Answer: 1,234 dollars", "$1234$")["score"] == 1.0
    assert grader.same_answer("1,234", "x=1234") and not grader.same_answer("1", "2")


def test_no_answer_is_never_right() -> None:
    # The published verifier puts "[INVALID]" in the place of a missing answer.
    assert grade(make_grader({"correct": DapoMathTerm()}), "nothing", "[INVALID]")["score"] == 0.0


def test_a_prompt_without_reference_is_an_error_of_the_row() -> None:
    assert grade(make_grader({"correct": DapoMathTerm()}), "Answer: 1")["failure"] == "reference"


def test_weight_two_is_plus_and_minus_one_up_to_a_constant() -> None:
    grader = make_grader({"correct": DapoMathTerm(weight=2.0)})
    rewards = [grade(grader, f"Answer: {answer}", "34")["reward"] - 1 for answer in ("34", "35")]
    assert rewards == [1.0, -1.0]
