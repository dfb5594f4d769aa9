"""Which prompts are the same."""

import pytest

from megatron_fipo.data.content_key import KEY_BYTES, content_key
from megatron_fipo.data.problem import UnusableRow


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a b", "  a\n\tb "),
        ("caf\u00e9", "cafe\u0301"),
        ("a b", [user("a  b")]),
        ([system("s"), user("a b")], [system(" s"), user("a\nb")]),
    ],
)
def test_the_same_prompt(first, second):
    assert content_key(first) == content_key(second)
    assert len(content_key(first)) == KEY_BYTES


def test_different_prompts():
    prompts = ["a b", "ab", "A b", [system("a b")], [user("a"), user("b")], [system("a"), user("b")]]
    assert len({content_key(prompt) for prompt in prompts}) == len(prompts)


def test_half_a_character_is_not_text():
    with pytest.raises(UnusableRow, match="not valid Unicode at character 1"):
        content_key("a\ud800")
