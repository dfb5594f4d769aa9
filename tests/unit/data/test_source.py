import json
import logging
from dataclasses import dataclass

import numpy as np
import pytest
from tokenizers import processors

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import DataConfig, JsonlPrompts
from megatron_fipo.data.row_index import SkippedRows
from megatron_fipo.data.source import open_sources
from megatron_fipo.types import Prompt
from tests.tiny_models import EOS_TOKEN_ID, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@dataclass
class Loaded:
    prompts: list[Prompt]
    skipped: dict[str, SkippedRows]


def read_all(source, config, tokenizer, field) -> Loaded:
    (opened,) = open_sources(source, config, tokenizer, field)
    opened.report()
    skipped = {}
    prompts = list(opened.prompts(skipped))
    if not prompts:
        raise opened.unusable(skipped)
    return Loaded(prompts, opened.rows.index.skipped | skipped)


@pytest.fixture
def load(tmp_path):
    """Write rows, given as objects or as raw lines, and load them."""

    def load_rows(*rows, tokenizer=None, prompt_field=None, answer_field=None, **options) -> Loaded:
        path = tmp_path / "train.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
        source = JsonlPrompts(path=path, prompt_field=prompt_field, answer_field=answer_field)
        config = DataConfig(train=source, **{"prompt_format": "raw", **options})
        return read_all(source, config, tokenizer or chat_tokenizer(), "data.train")

    return load_rows


def refusal(load, *rows, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*rows, **options)
    return str(caught.value)


def test_raw_prompt(load):
    prompt, second = load({"prompt": "1+1=", "answer": " 2 "}, {"prompt": "é", "answer": "x"}).prompts
    assert (prompt.id, prompt.text, prompt.answer) == ("train:1", "1+1=", " 2 ")
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.tolist() == byte_tokenizer()("1+1=").input_ids
    assert second.id == "train:2" and len(second.token_ids) == 2


def test_raw_prompt_begins_as_the_tokenizer_wants(load):
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS_TOKEN_ID)]
    )
    (prompt,) = load({"prompt": "a", "answer": "b"}, tokenizer=tokenizer).prompts
    assert prompt.token_ids[0] == EOS_TOKEN_ID and len(prompt.token_ids) == 2
    # The chat template writes its own.
    (prompt,) = load({"prompt": "a", "answer": "b"}, tokenizer=tokenizer, prompt_format="chat").prompts
    assert EOS_TOKEN_ID not in prompt.token_ids


def test_a_tokenizer_that_closes_the_text_is_refused(load):
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS_TOKEN_ID)]
    )
    message = refusal(load, {"prompt": "a", "answer": "b"}, tokenizer=tokenizer)
    assert message.startswith("data.prompt_format = raw: ") and "add_eos_token" in message


def test_chat_prompt_is_what_the_template_says(load):
    tokenizer = chat_tokenizer()
    (prompt,) = load({"prompt": "hi", "answer": "x"}, tokenizer=tokenizer, prompt_format="chat").prompts
    assert prompt.text == "<user>hi<assistant>"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt.token_ids.tolist() == whole


def test_conversations_and_the_system_prompt(load):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [{"prompt": prompt, "answer": "x"} for prompt in ("plain", own, turns)]
    texts = [prompt.text for prompt in load(*rows, prompt_format="chat", system_prompt="S").prompts]
    assert texts == [
        "<system>S<user>plain<assistant>",
        "<system>own<user>q<assistant>",
        "<system>S<user>a<assistant>b<user>c<assistant>",
    ]


def test_other_keys_and_a_byte_order_mark(load):
    row = b"\xef\xbb\xbf" + json.dumps({"question": "q", "solution": "s", "prompt": 3}).encode()
    (prompt,) = load(row, prompt_field="question", answer_field="solution").prompts
    assert (prompt.text, prompt.answer) == ("q", "s")


@pytest.mark.parametrize("written", ["42", "-7", "1.50", "1e400", "9" * 5000])
def test_numbers_stay_as_written(load, written):
    (prompt,) = load(b'{"prompt": "q", "answer": %s}' % written.encode()).prompts
    assert prompt.answer == written and type(prompt.answer) is str


GOOD = {"prompt": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (b'{"prompt": "q", "answer": ', "broken", "not JSON"),
        (b'{"prompt": "\xff", "answer": "a"}', "broken", "not UTF-8"),
        (b"[" * 100_000, "broken", "nested too deep"),
        (b'{"prompt": "q", "answer": NaN}', "broken", "NaN is no number"),
        ([1], "broken", "not an object with columns"),
        ({"prompt": 5, "answer": "a"}, "broken", "neither text nor a list"),
        ({"prompt": {"role": "user"}, "answer": "a"}, "broken", "neither text nor a list"),
        ({"prompt": ["hi"], "answer": "a"}, "broken", "a text role and content"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "a"}, "broken", "content"),
        ({"prompt": [{"role": "user"}], "answer": "a"}, "broken", "a text role and content"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"}, "broken", "assistant's turn"),
        (b'{"prompt": "\\ud800", "answer": "a"}', "broken", "not valid Unicode"),
        ({"prompt": "q", "answer": ["a"]}, "broken", "neither text nor a number"),
        ({"prompt": "q", "answer": True}, "broken", "neither text nor a number"),
        ({"answer": "a"}, "empty", 'no "prompt"'),
        ({"prompt": " \n", "answer": "a"}, "empty", "blank"),
        ({"prompt": [], "answer": "a"}, "empty", 'no "prompt"'),
        ({"prompt": [{"role": "user", "content": " "}], "answer": "a"}, "empty", "blank"),
        ({"prompt": "q"}, "no_answer", 'no "answer"'),
        ({"prompt": "q", "answer": None}, "no_answer", 'no "answer"'),
        ({"prompt": "q", "answer": "  "}, "no_answer", "blank"),
        ({"prompt": "q" * 60, "answer": "a"}, "over_long", "max_prompt_tokens = 50"),
    ],
)
def test_a_bad_row_is_skipped_and_counted(load, row, reason, detail):
    loaded = load(GOOD, row, GOOD, prompt_format="chat", max_prompt_tokens=50)
    assert [prompt.id for prompt in loaded.prompts] == ["train:1", "train:3"]
    assert list(loaded.skipped) == [reason]
    rows = loaded.skipped[reason]
    assert (rows.count, rows.first_rows) == (1, [2]) and detail in rows.detail


def test_the_longest_prompt_allowed(load):
    rows = [{"prompt": "x" * length, "answer": "a"} for length in (8, 9)]
    loaded = load(*rows, max_prompt_tokens=8)
    assert [len(prompt.token_ids) for prompt in loaded.prompts] == [8]


def test_blank_lines_are_no_rows_but_keep_the_numbers(load):
    loaded = load(GOOD, b"", b"  \r", GOOD, b"")
    assert [prompt.id for prompt in loaded.prompts] == ["train:1", "train:4"]
    assert not loaded.skipped


def test_line_separators_inside_text_do_not_split_rows(load):
    row = json.dumps({"prompt": "a\u2028b\x0cc", "answer": "x"}, ensure_ascii=False).encode()
    (prompt,) = load(row).prompts
    assert prompt.text == "a\u2028b\x0cc"


def test_a_conversation_in_raw_format_is_skipped(load):
    loaded = load(GOOD, {"prompt": [{"role": "user", "content": "q"}], "answer": "a"})
    assert "prompt_format chat" in loaded.skipped["broken"].detail


def test_a_conversation_that_the_template_refuses_is_skipped(load):
    template = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + TEMPLATE
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    loaded = load(GOOD, {"prompt": turns, "answer": "a"}, tokenizer=chat_tokenizer(template), prompt_format="chat")
    assert "one turn only" in loaded.skipped["broken"].detail


def test_the_report_names_the_first_rows_of_each_reason(load, caplog):
    caplog.set_level(logging.WARNING)
    load(GOOD, *[b"{"] * 7, {"prompt": "q"})
    broken, no_answer = caplog.messages
    assert "skipped 7 broken rows (2, 3, 4, 5, 6, ...), the first with not JSON" in broken
    assert 'skipped 1 no_answer row (9), the first with no "answer"' in no_answer
    assert all(message.startswith("data.train.path = ") for message in caplog.messages)


def test_a_source_without_usable_prompts_is_an_error(load):
    message = refusal(load, b"{", {"prompt": "q"})
    assert message.startswith("data.train.path = ") and "train.jsonl: gives no usable prompt" in message
    assert "1 broken row (1)" in message and "1 no_answer row (2)" in message
    assert "it is empty" in refusal(load)


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_a_file_that_cannot_be_opened(tmp_path, name):
    source = JsonlPrompts(path=tmp_path / name)
    config = DataConfig(train=source, prompt_format="raw")
    with pytest.raises(ConfigError, match=r"^data\.evaluation\.path = .*: must be a readable file"):
        open_sources(source, config, byte_tokenizer(), "data.evaluation")


def test_chat_without_a_template(load):
    tokenizer = chat_tokenizer(None)
    message = refusal(load, GOOD, tokenizer=tokenizer, prompt_format="chat")
    assert message.startswith("data.prompt_format = chat: needs a chat template")
    assert 'set data.prompt_format to "raw"' in message
    load(GOOD, tokenizer=tokenizer)


def test_a_template_without_system_messages(load):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    options = {"tokenizer": chat_tokenizer(template), "prompt_format": "chat"}
    message = refusal(load, GOOD, system_prompt="S", **options)
    assert message.startswith("data.system_prompt = S: ") and "no system" in message
    load(GOOD, **options)


def test_a_template_that_fails_always(load):
    tokenizer = chat_tokenizer("{{ raise_exception('never') }}")
    message = refusal(load, GOOD, tokenizer=tokenizer, prompt_format="chat")
    assert message.startswith("data.prompt_format = chat: ") and "never" in message
