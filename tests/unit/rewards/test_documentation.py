"""docs/rewards.md: its configurations load, and its functions are rewards."""

import re
from pathlib import Path

import pytest

from megatron_fipo.config.base import config_class
from megatron_fipo.config.load import load_config
from megatron_fipo.config.reward import PythonTerm, RewardConfig
from megatron_fipo.rewards import screens
from tests.unit.rewards.grading import grade, make_grader

PAGE = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@config_class
class Root:
    """The section alone."""

    reward: RewardConfig
    """Scoring."""


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_configurations_load(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert load_config(Root, file).reward.terms


def test_every_type_is_shown() -> None:
    kinds = re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE)
    shown = {kind for text in YAML for kind in re.findall(r"type: (\w+)", text)}
    assert set(kinds[1:]) == shown


def test_the_functions_are_rewards(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(PYTHON)
    terms = {name: PythonTerm(function=f"{tmp_path}/my_rewards.py:{name}") for name in ("thinks_first", "near")}
    grader = make_grader(terms)
    assert grade(grader, "<think>1 + 1</think> 2", "2")["terms"] == {"thinks_first": 1.0, "near": 1.0}
    assert grade(grader, "It is 4", "2")["terms"] == {"thinks_first": 0.0, "near": 1 / 3}


def test_the_second_example_is_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(PYTHON)
    file = tmp_path / "config.yaml"
    file.write_text(YAML[1].replace("my_rewards.py", f"{tmp_path}/my_rewards.py"))
    reward = load_config(Root, file).reward
    assert [term.weight for term in reward.terms.values()] == [2.0, 1.0, 0.1]
    grader = make_grader(reward.terms, max_response_tokens=20_480, require_stop=False)
    result = grade(grader, "<think>x</think> Answer: 34", "34", num_tokens=18_432, finish_reason="length")
    assert (result["score"], result["reward"]) == (1.0, pytest.approx(2.0 - 0.5 + 0.1))


@pytest.mark.parametrize(
    ("row", "limit"),
    [
        ("characters of an answer", screens.MAX_ANSWER_CHARACTERS),
        ("nested brackets", screens.MAX_BRACKET_DEPTH),
        ("digits of one number", screens.MAX_DIGITS),
        ("an exponent", screens.MAX_EXPONENT),
        ("exponents upon each other", screens.MAX_TOWER),
        ("n in n!", screens.MAX_FACTORIAL),
        ("commas", screens.MAX_SEPARATORS),
    ],
)
def test_limits_are_those_of_the_code(row: str, limit: int) -> None:
    assert re.search(rf"^\| {re.escape(row)}[^|]*\| {limit:,}\b", PAGE, re.MULTILINE)
