"""Which columns hold prompt and answer, and how the reference is taken out of an answer."""

from decimal import Decimal
from pathlib import Path

import pytest

from megatron_fipo.config.data import JsonlPrompts
from megatron_fipo.data.problem import UnusableRow
from megatron_fipo.data.schema import DAPO, GSM8K, SIMPLE, Schema, WrittenNumber, choose_schema, look_up

DAPO_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"content": "What is 1 + 1?", "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
GSM8K_ROW = {"question": "How many?", "answer": "She has 2 * 617 = <<2*617=1234>>1234.\n#### 1,234"}
SIMPLE_ROW = {"prompt": "1 + 1 =", "answer": 2}


def source(**values) -> JsonlPrompts:
    return JsonlPrompts(path=Path("x.jsonl"), **values)


def refusal(schema: Schema, row) -> tuple[str, str]:
    with pytest.raises(UnusableRow) as caught:
        schema.find(row)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    ("row", "schema", "found"),
    [
        (SIMPLE_ROW, SIMPLE, ("1 + 1 =", "2")),
        (DAPO_ROW, DAPO, (DAPO_ROW["prompt"], "34")),
        (GSM8K_ROW, GSM8K, ("How many?", "1234")),
    ],
)
def test_known_schemas_are_recognised(row, schema, found):
    assert choose_schema(source(), [row]) == schema
    assert schema.find(row) == found


def test_most_of_the_first_rows_decide():
    rows = [{"prompt": "odd"}, SIMPLE_ROW, [1], GSM8K_ROW, GSM8K_ROW, {"question": "no answer"}]
    assert choose_schema(source(), rows) == GSM8K
    # Nothing is recognised: the simple names are what the report then asks for.
    assert choose_schema(source(), []) == choose_schema(source(), [{"problem": "x", "solution": "y"}]) == SIMPLE


def test_a_question_without_the_mark_is_not_taken_for_gsm8k():
    assert choose_schema(source(), [{"question": "q", "answer": "plain"}]) == SIMPLE


def test_columns_by_name():
    schema = choose_schema(source(prompt_field="meta.problem", answer_field="meta.gold.value"), [DAPO_ROW])
    assert schema.find({"meta": {"problem": "p", "gold": {"value": 7}}}) == ("p", "7")
    assert refusal(schema, {"meta": {"problem": "p", "gold": 7}}) == ("no_answer", 'no "meta.gold.value"')
    assert refusal(schema, {"meta": None}) == ("empty", 'no "meta.problem"')
    # Naming one column leaves the other at its plain name.
    assert choose_schema(source(prompt_field="q"), [GSM8K_ROW]).answer_field == "answer"
    assert choose_schema(source(answer_field="a"), [GSM8K_ROW]).prompt_field == "prompt"


def test_a_column_whose_name_has_a_dot_comes_first():
    assert look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert look_up({"a": {"b": 2}}, "a.b") == 2
    assert look_up({"a": 3}, "a.b") is None


def test_the_last_match_of_the_pattern_counts():
    schema = choose_schema(source(answer_pattern=r"\\boxed\{([^}]*)\}"), [SIMPLE_ROW])
    assert schema.find({"prompt": "p", "answer": r"\boxed{1} or rather \boxed{2}"}) == ("p", "2")
    reason, detail = refusal(schema, {"prompt": "p", "answer": "x" * 90 + "y"})
    assert reason == "no_answer" and detail.endswith(f"'...{'x' * 79}y'")
    # A number has no text around it.
    assert schema.find({"prompt": "p", "answer": WrittenNumber("1.50")}) == ("p", "1.50")


def test_a_pattern_of_ones_own_keeps_the_recognised_columns():
    schema = choose_schema(source(answer_pattern=r"is (\d+)"), [GSM8K_ROW])
    assert schema.find({"question": "q", "answer": "it is 5\n#### 6"}) == ("q", "5")


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ("1,234", "1234"),
        ("$12,345,678.50", "$12345678.50"),
        ("-1,000", "-1000"),
        ("12,34", "12,34"),
        ("1, 2", "1, 2"),
        ("3", "3"),
    ],
)
def test_thousands_of_gsm8k_are_joined(written, reference):
    assert GSM8K.find({"question": "q", "answer": f"#### {written}"})[1] == reference
    assert SIMPLE.find({"prompt": "q", "answer": written})[1] == written


def test_gsm8k_without_a_reference():
    reason, detail = refusal(GSM8K, {"question": "q", "answer": "just text"})
    assert (reason, detail) == ("no_answer", "answer_pattern finds nothing in \"answer\": 'just text'")
    assert refusal(GSM8K, {"question": "q", "answer": "####  "})[0] == "no_answer"


def test_a_decimal_column_is_read_as_it_is_written():
    assert SIMPLE.find({"prompt": "p", "answer": Decimal("1.50")}) == ("p", "1.50")


def test_a_number_that_is_none_is_no_answer():
    assert refusal(SIMPLE, {"prompt": "p", "answer": float("nan")}) == ("no_answer", 'no "answer"')
