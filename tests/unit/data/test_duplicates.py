"""The first of equal prompts stays, over all sources."""

from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.duplicates import skip_duplicates
from megatron_fipo.data.source import Source, open_sources
from tests.tiny_models import byte_tokenizer
from tests.unit.data.prompt_files import data_config, jsonl_source, numbered, open_stream


def opened(folder: Path, *contents: str) -> list[Source]:
    """A source for every text, a row for each of its letters."""
    sources = tuple(
        jsonl_source(folder, f"s{number}", [{"prompt": letter, "answer": "x"} for letter in letters])
        for number, letters in enumerate(contents)
    )
    return open_sources(sources, data_config(*sources), byte_tokenizer(), "data.train")


@pytest.mark.parametrize(
    ("contents", "kept"),
    [
        (["abc"], ["abc"]),
        (["abacba"], ["abc"]),
        (["ab", "bcac", "dad"], ["ab", "c", "d"]),
        (["zzz", "yzy"], ["z", "y"]),
    ],
)
def test_the_first_of_equal_prompts_stays(tmp_path: Path, contents: list[str], kept: list[str]):
    sources = opened(tmp_path, *contents)
    skip_duplicates(sources)
    assert ["".join(prompt.text for prompt in source.prompts({})) for source in sources] == kept


def test_the_report_says_which_prompt_is_repeated(tmp_path: Path):
    first, second = opened(tmp_path, "aab", "cba")
    skip_duplicates([first, second])
    assert first.rows.index.skipped["duplicate"].describe("duplicate") == (
        "1 duplicate row (2), the first with the prompt of s0:1"
    )
    assert second.rows.index.skipped["duplicate"].describe("duplicate") == (
        "2 duplicate rows (2, 3), the first with the prompt of s0:3"
    )


def test_a_source_of_duplicates_alone_is_an_error(tmp_path: Path):
    sources = [jsonl_source(tmp_path, name, numbered(3)) for name in ("first", "second")]
    with pytest.raises(ConfigError) as caught:
        open_stream(*sources)
    assert str(caught.value).startswith(
        f"data.train.1.path = {tmp_path}/second.jsonl: gives no usable prompt (3 duplicate rows (1, 2, 3), the first "
        "with the prompt of first:1)"
    )


def test_duplicates_stay_where_they_are_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = jsonl_source(tmp_path, "twice", [*numbered(2), *numbered(2)])
    stream = open_stream(source, deduplicate=False, shuffle=False)
    assert [prompt.id for prompt in stream.next(4)] == ["twice:1", "twice:2", "twice:3", "twice:4"]
    assert not caplog.messages
