"""Which prompts are held out, and that training never draws them."""

from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.evaluation import load_evaluation_prompts
from megatron_fipo.data.stream import PromptStream
from tests.tiny_models import byte_tokenizer
from tests.unit.data.prompt_files import data_config, jsonl_source, numbered, open_stream


def held_out(folder: Path, rows: list, wanted: float) -> set[str]:
    """Texts that are held out of a file of these rows."""
    stream = open_stream(jsonl_source(folder, "x", rows), held_out=wanted)
    assert stream.held_out is not None
    return {prompt.text for prompt in stream.held_out.prompts()}


@pytest.mark.parametrize("wanted", [7, 0.3])
def test_held_out_prompts_are_never_drawn(tmp_path: Path, wanted: float):
    sources = [jsonl_source(tmp_path, name, numbered(30, text=name)) for name in ("one", "two")]
    config = data_config(*sources, held_out=wanted)
    stream = PromptStream(config, byte_tokenizer(), seed=1)
    kept = load_evaluation_prompts(config, byte_tokenizer(), stream=stream)
    drawn = {prompt.id for prompt in stream.next(300)}
    assert len(kept) == 7 if wanted == 7 else 5 < len(kept) < 30
    assert {prompt.source for prompt in kept} == {"one", "two"}
    assert not drawn & {prompt.id for prompt in kept}
    assert len(drawn) + len(kept) == 60


def test_duplicates_of_a_held_out_prompt_are_never_drawn(tmp_path: Path):
    source = jsonl_source(tmp_path, "twice", [*numbered(20), *numbered(20)])
    config = data_config(source, held_out=5, deduplicate=False)
    stream = PromptStream(config, byte_tokenizer(), seed=1)
    kept = [prompt.text for prompt in load_evaluation_prompts(config, byte_tokenizer(), stream=stream)]
    drawn = [prompt.text for prompt in stream.next(30)]
    assert len(set(kept)) == len(kept) == 5
    assert sorted(drawn) == sorted(2 * [row["prompt"] for row in numbered(20) if row["prompt"] not in kept])


@pytest.mark.parametrize("wanted", [20, 0.2])
def test_order_and_reading_do_not_matter(tmp_path: Path, wanted: float):
    rows = numbered(100)
    assert held_out(tmp_path, rows, wanted) == held_out(tmp_path, rows[::-1], wanted)


def test_a_fraction_only_grows_with_the_file(tmp_path: Path):
    before = held_out(tmp_path, numbered(100), 0.2)
    after = held_out(tmp_path, numbered(300), 0.2)
    assert before < after
    assert before == after & {row["prompt"] for row in numbered(100)}
    assert 30 < len(after) < 90


def test_a_number_takes_in_new_rows_alone(tmp_path: Path):
    before = held_out(tmp_path, numbered(100), 20)
    after = held_out(tmp_path, numbered(300), 20)
    # What was trained on stays a training prompt.
    assert len(before) == len(after) == 20
    assert after - before <= {row["prompt"] for row in numbered(200, first=100)}
    assert after - before


def test_a_number_counts_usable_prompts(tmp_path: Path):
    rows = [{"prompt": "x" * (20 if number % 2 else 5) + str(number), "answer": "a"} for number in range(40)]
    stream = open_stream(jsonl_source(tmp_path, "x", rows), held_out=15, max_prompt_tokens=10)
    assert stream.held_out is not None
    assert len(stream.held_out.prompts()) == 15
    assert len({prompt.id for prompt in stream.next(50)}) == 5


def test_the_prompts_come_source_by_source_up_to_a_limit(tmp_path: Path):
    sources = [jsonl_source(tmp_path, name, numbered(50, text=name)) for name in ("one", "two")]
    config = data_config(*sources, held_out=0.5)
    prompts = load_evaluation_prompts(config, byte_tokenizer(), limit=4)
    assert [prompt.source for prompt in prompts] == ["one"] * 4 + ["two"] * 4
    # Not the first ones of the file.
    assert [prompt.id for prompt in prompts[:4]] != [f"one:{number}" for number in range(1, 5)]


@pytest.mark.parametrize(
    ("wanted", "rule"),
    [
        (21, "must not exceed the 20 usable prompts of data.train"),
        (20, "leaves no usable training prompt in data.train.0.path = {path}"),
        (0.999999, "leaves no usable training prompt in data.train.0.path = {path}"),
        (1e-9, "holds out no usable prompt of the 20 training prompts"),
    ],
)
def test_more_than_there_is(tmp_path: Path, wanted: float, rule: str):
    source = jsonl_source(tmp_path, "x", numbered(20))
    with pytest.raises(ConfigError) as caught:
        open_stream(source, held_out=wanted)
    assert str(caught.value) == (
        f"data.held_out = {wanted}: {rule.format(path=source.path)}; hold out a number that the training prompts have "
        "room for"
    )


def test_a_source_that_would_keep_unusable_rows_alone(tmp_path: Path):
    rows = [{"prompt": "short", "answer": "a"}, {"prompt": "x" * 20, "answer": "a"}]
    with pytest.raises(ConfigError, match="leaves no usable training prompt"):
        open_stream(jsonl_source(tmp_path, "x", rows), held_out=1, max_prompt_tokens=10)
