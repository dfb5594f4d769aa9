"""The prompts that evaluation tries."""

from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.evaluation import load_evaluation_prompts
from megatron_fipo.data.stream import PromptStream
from tests.tiny_models import byte_tokenizer
from tests.unit.data.prompt_files import data_config, jsonl_source, numbered


def test_sources_come_one_after_the_other_up_to_a_limit(tmp_path: Path):
    train = jsonl_source(tmp_path, "train", numbered(3))
    sources = tuple(jsonl_source(tmp_path, name, numbered(size, text=name)) for name, size in (("a", 2), ("b", 5)))
    config = data_config(train, evaluation=sources)
    prompts = load_evaluation_prompts(config, byte_tokenizer())
    assert [prompt.id for prompt in prompts] == ["a:1", "a:2", *(f"b:{number}" for number in range(1, 6))]
    assert [prompt.source for prompt in prompts] == ["a"] * 2 + ["b"] * 5
    prompts = load_evaluation_prompts(config, byte_tokenizer(), limit=3)
    assert [prompt.id for prompt in prompts] == ["a:1", "a:2", "b:1", "b:2", "b:3"]


def test_none_without_a_source(tmp_path: Path):
    assert load_evaluation_prompts(data_config(jsonl_source(tmp_path, "x", numbered(3))), byte_tokenizer()) == ()


def test_duplicates_and_bad_rows_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [*numbered(2), *numbered(2), b"{", {"prompt": "x" * 50, "answer": "a"}]
    source = jsonl_source(tmp_path, "x", rows)
    config = data_config(jsonl_source(tmp_path, "t", numbered(1, text="t")), evaluation=source, max_prompt_tokens=20)
    assert [prompt.id for prompt in load_evaluation_prompts(config, byte_tokenizer())] == ["x:1", "x:2"]
    broken, duplicate, over_long = (message.partition("skipped ")[2] for message in caplog.messages)
    assert broken.startswith("1 broken row (5), the first with not JSON")
    assert duplicate == "2 duplicate rows (3, 4), the first with the prompt of x:1"
    assert over_long == "1 over_long row (6), the first with 50 tokens, data.max_prompt_tokens = 20"


def test_prompts_that_training_draws_too_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train = jsonl_source(tmp_path, "train", [{"prompt": " problem   2 ", "answer": "2"}, *numbered(3, first=3)])
    evaluation = jsonl_source(tmp_path, "test", numbered(6))
    config = data_config(train, evaluation=evaluation)
    stream = PromptStream(config, byte_tokenizer(), seed=1)
    load_evaluation_prompts(config, byte_tokenizer(), stream=stream)
    assert caplog.messages == [
        f"data.evaluation.path = {evaluation.path}: 4 of 6 evaluation prompts also occur among the training prompts"
    ]
    caplog.clear()
    load_evaluation_prompts(config, byte_tokenizer(), limit=2, stream=stream)
    assert not caplog.messages


def test_a_source_without_a_usable_prompt_is_an_error(tmp_path: Path):
    train, empty = (jsonl_source(tmp_path, name, rows) for name, rows in (("train", numbered(1)), ("empty", [])))
    config = data_config(train, evaluation=(train, empty))
    with pytest.raises(ConfigError, match=r"^data\.evaluation\.1\.path = .*/empty.jsonl: .*\(it is empty\)"):
        load_evaluation_prompts(config, byte_tokenizer())
