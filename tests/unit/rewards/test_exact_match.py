import pickle
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.reward import RewardConfig
from megatron_fipo.rewards.answer import MAX_SEARCHED_CHARACTERS, find_answer
from megatron_fipo.rewards.base import CheckedScorer, RewardError
from megatron_fipo.rewards.registry import build_scorer, check_prompts
from megatron_fipo.types import Prompt


def prompt(answer="42", **metadata):
    return Prompt(id="train:17", token_ids=np.array([1], dtype=np.int32), text="q", answer=answer, metadata=metadata)


def score(response, answer="42", finish_reason="stop", **config):
    return build_scorer(RewardConfig(**config)).score(prompt(answer), response, finish_reason)


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
        ("a  b", "a b", 0.0),
    ],
)
def test_whole_response(response, answer, expected):
    reward = score(response, answer)
    assert reward == expected and type(reward) is float


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
def test_the_last_match_counts(response, expected):
    assert score(response, answer_pattern=r"####\s*(\d+)") == expected


def test_the_first_group_is_the_answer_without_outer_space():
    pattern = r"<(answer|result)>(.*?)</\1>"
    assert score("<answer> 42 </answer>", answer="answer", answer_pattern=pattern) == 1.0
    assert score("<answer> 42\n</answer>", answer_pattern=r"(?s)<answer>(.*?)</answer>") == 1.0


def test_a_group_that_took_no_part_is_no_answer():
    assert find_answer("x 42 x", re.compile(r"(\d+)|x$")) is None


def test_only_the_end_of_a_long_response_is_searched():
    pattern = re.compile(r"#(\d+)")
    assert find_answer("#42" + "." * (MAX_SEARCHED_CHARACTERS - 3), pattern) == "42"
    assert find_answer("#42" + "." * (MAX_SEARCHED_CHARACTERS - 2), pattern) is None
    assert find_answer("." * 10**6 + "#42", pattern) == "42"


def test_a_very_long_response_takes_no_time():
    start = time.perf_counter()
    # Quadratic on a text without "#": 10 s on these million characters, 1 ms on the end of them.
    assert score("1" * 1_000_000, answer_pattern=r"(\d)[^#]{0,5000}#") == 0.0
    assert time.perf_counter() - start < 5


@given(answer=st.text(min_size=1).filter(str.strip), around=st.text(alphabet=" \n\t", max_size=3))
def test_any_reference_matches_itself(answer, around):
    assert score(around + answer + around, answer) == 1.0
    assert score(answer + "x", answer) == 0.0


@pytest.mark.parametrize("finish_reason", ["length", "abort"])
def test_an_unfinished_response(finish_reason):
    assert score("42", finish_reason=finish_reason) == 0.0
    assert score("42", finish_reason=finish_reason, require_stop=False) == 1.0


def test_a_scorer_can_be_sent_to_another_process():
    scorer = build_scorer(RewardConfig(answer_pattern=r"#(\d+)"))
    copied = pickle.loads(pickle.dumps(scorer))
    assert copied == scorer and copied.score(prompt(), "#42", "stop") == 1.0


class Constant:
    """A scorer of fixed outcome."""

    def __init__(self, outcome):
        self.outcome = outcome

    def score(self, prompt, response_text, finish_reason):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (float("nan"), "nan is not a finite number"),
        (float("inf"), "inf is not a finite number"),
        (None, "TypeError"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_a_failing_scorer_is_told_with_the_prompt(outcome, problem):
    with pytest.raises(RewardError) as caught:
        CheckedScorer(scorer=Constant(outcome), require_stop=True).score(prompt(), "x", "stop")
    assert str(caught.value).startswith(f"reward of a response to train:17: {problem}")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_rewards_are_plain_floats():
    checked = CheckedScorer(scorer=Constant(np.float32(0.5)), require_stop=True)
    assert type(checked.score(prompt(), "x", "stop")) is float


def test_a_prompt_without_reference_is_no_zero():
    with pytest.raises(RewardError, match="train:17: .* no reference answer"):
        score("42", answer=None)


def test_prompts_without_reference_are_found_before_the_run():
    config = RewardConfig()
    check_prompts(config, [prompt()] * 3)
    with pytest.raises(ConfigError) as caught:
        check_prompts(config, [prompt(), prompt(None), prompt(None)], "data.train")
    assert str(caught.value) == (
        "reward.type = exact_match: needs a reference answer for every prompt, and 2 of 3 in data.train have none, "
        'train:17 first; set reward.type to "reasoning_gym", whose scorers know a task with many right answers'
    )


def test_prompts_without_a_task_are_found_before_the_run():
    config = RewardConfig(type="reasoning_gym")
    check_prompts(config, [prompt(entry={})])
    with pytest.raises(ConfigError, match=r"^reward.type = reasoning_gym: needs a reasoning-gym problem .* 1 of 2"):
        check_prompts(config, [prompt(), prompt(entry={})])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answer_pattern": "("}, "answer_pattern = (: must be a regular expression (missing )"),
        ({"answer_pattern": r"\d+"}, r"answer_pattern = \d+: must have a group"),
        ({"answer_pattern": r"(?:\d+)"}, "answer_pattern = (?:\\d+): must have a group"),
        ({"score_threshold": 0.0}, "score_threshold = 0.0: must lie in (0, 1]"),
        ({"score_threshold": float("nan")}, "score_threshold = nan: must lie in (0, 1]"),
    ],
)
def test_values_that_cannot_be_used(values, message):
    with pytest.raises(ConfigError) as caught:
        RewardConfig(**values)
    assert str(caught.value).startswith(message)
