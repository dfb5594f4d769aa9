"""The order in which training draws prompts, and that a resumed stream keeps it."""

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import ParquetPrompts, ReasoningGymPrompts
from megatron_fipo.data.stream import EndOfPrompts, PromptStream
from tests.unit.data.prompt_files import jsonl_source, numbered, open_stream, write_jsonl, write_parquet


def ids(stream: PromptStream, n: int) -> list[str]:
    return [prompt.id for prompt in stream.next(n)]


@pytest.fixture
def mixture(tmp_path: Path) -> list:
    """Sources with weights, rows that are skipped at once and rows that are skipped when drawn."""
    rows: list[Any] = [*numbered(7), b"{", *numbered(2), {"prompt": "x" * 99, "answer": "long"}, *numbered(4, first=50)]
    return [
        jsonl_source(tmp_path, "file", rows, weight=2.0),
        ParquetPrompts(path=write_parquet(tmp_path / "table.parquet", numbered(5, text="cell")), weight=1.0),
        jsonl_source(tmp_path, "small", numbered(6, text="sum"), weight=0.5, name="sums"),
    ]


OPTIONS = {"max_prompt_tokens": 60}


def test_an_epoch_draws_every_prompt_once_in_a_new_order(tmp_path: Path):
    stream = open_stream(jsonl_source(tmp_path, "x", numbered(50)))
    epochs = [ids(stream, 50) for _ in range(3)]
    in_file_order = [f"x:{number}" for number in range(1, 51)]
    assert all(sorted(epoch) == sorted(in_file_order) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, in_file_order]}) == 4
    assert stream.epoch == 3
    assert ids(open_stream(jsonl_source(tmp_path, "x", numbered(50)), seed=2), 50) not in epochs


def test_the_order_of_a_single_source_is_that_of_its_seed_and_epoch(tmp_path: Path):
    stream = open_stream(jsonl_source(tmp_path, "x", numbered(9)), seed=2**60 + 5)
    for epoch in range(2):
        order = np.random.default_rng(np.random.SeedSequence([2**60 + 5, epoch])).permutation(9)
        assert ids(stream, 9) == [f"x:{place + 1}" for place in order]


def test_file_order_without_shuffling(tmp_path: Path):
    stream = open_stream(jsonl_source(tmp_path, "x", numbered(3)), shuffle=False)
    assert ids(stream, 7) == ["x:1", "x:2", "x:3", "x:1", "x:2", "x:3", "x:1"]
    assert stream.epoch == 2


def test_prompts_know_their_source(tmp_path: Path):
    first = jsonl_source(tmp_path, "a", numbered(3), name="easy")
    second = jsonl_source(tmp_path, "b", numbered(3, first=9))
    prompts = open_stream(first, second, shuffle=False).next(4)
    assert [(prompt.source, prompt.id, prompt.answer) for prompt in prompts] == [
        ("easy", "easy:1", "0"),
        ("b", "b:1", "9"),
        ("easy", "easy:2", "1"),
        ("b", "b:2", "10"),
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.7, 0.2, 0.1), (1e-3, 5.0)])
def test_weights_are_shares_of_the_draws(tmp_path: Path, weights: tuple[float, ...]):
    sources = [
        jsonl_source(tmp_path, f"s{place}", numbered(10, text=f"s{place}"), weight=weight)
        for place, weight in enumerate(weights)
    ]
    stream = open_stream(*sources)
    counts: Counter[str] = Counter()
    for total in range(1, 401):
        counts[stream.next(1)[0].source] += 1
        for source, weight in zip(sources, weights, strict=True):
            # Never more than a draw away from the share, at any time.
            assert abs(counts[source.path.stem] - total * weight / sum(weights)) < 1 + 1e-9


def test_how_prompts_are_asked_for_makes_no_difference(mixture: list):
    whole = ids(open_stream(*mixture, **OPTIONS), 60)
    stream = open_stream(*mixture, **OPTIONS)
    assert [name for n in (1, 0, 7, 20, 2, 30) for name in ids(stream, n)] == whole


@pytest.mark.parametrize("num_drawn", [0, 1, 9, 16, 17, 40, 100])
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(mixture: list, num_drawn: int):
    stream = open_stream(*mixture, **OPTIONS)
    stream.next(num_drawn)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = open_stream(*mixture, **OPTIONS)
    resumed.next(3)
    resumed.load_state_dict(state)
    assert resumed.counters() == stream.counters()
    for _ in range(4):
        first, second = stream.next(13), resumed.next(13)
        assert [prompt.id for prompt in first] == [prompt.id for prompt in second]
        assert all((a.token_ids == b.token_ids).all() for a, b in zip(first, second, strict=True))
    assert (resumed.counters(), resumed.epoch) == (stream.counters(), stream.epoch)
    assert stream.epoch >= 3 or num_drawn < 100


def test_generated_problems_in_a_mixture(tmp_path: Path):
    pytest.importorskip("reasoning_gym", reason="an extra of the package")
    gym = ReasoningGymPrompts(task="chain_sum", size=6, name="sums")
    stream = open_stream(gym, jsonl_source(tmp_path, "x", numbered(5), weight=2.0))
    stream.next(7)
    state = stream.state_dict()
    first = stream.next(20)
    assert {prompt.source for prompt in first if "entry" in prompt.metadata} == {"sums"}
    stream.load_state_dict(state)
    assert [prompt.id for prompt in stream.next(20)] == [prompt.id for prompt in first]


def test_the_state_is_small_and_does_not_grow(mixture: list):
    stream = open_stream(*mixture, **OPTIONS)
    sizes = []
    for _ in range(3):
        stream.next(50)
        sizes.append(len(json.dumps(stream.state_dict())))
    assert max(sizes) < 1000 and max(sizes) - min(sizes) < 20


def test_the_same_draws_give_the_same_state(mixture: list):
    once, piece_by_piece = open_stream(*mixture, **OPTIONS), open_stream(*mixture, **OPTIONS)
    once.next(33)
    for _ in range(33):
        piece_by_piece.next(1)
    assert once.state_dict() == piece_by_piece.state_dict()


def test_counters(mixture: list):
    stream = open_stream(*mixture, **OPTIONS)
    assert stream.counters() == {
        **{f"data/{name}/{key}": 0.0 for name in ("file", "table", "sums") for key in ("drawn", "epoch")},
        "data/skipped_broken": 1.0,
        "data/skipped_duplicate": 2.0,
    }
    stream.next(70)
    # The long row is met in every epoch and counted in the first.
    assert stream.counters() == {
        **{"data/file/drawn": 40.0, "data/table/drawn": 20.0, "data/sums/drawn": 10.0},
        **{"data/file/epoch": 3.0, "data/table/epoch": 4.0, "data/sums/epoch": 1.0},
        **{"data/skipped_broken": 1.0, "data/skipped_duplicate": 2.0, "data/skipped_over_long": 1.0},
    }
    assert stream.epoch == 1


def test_rows_that_are_skipped_when_drawn_are_reported_a_few_times(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"prompt": "x" * length, "answer": "a"} for length in (1, 5, *range(20, 40), 6)]
    stream = open_stream(jsonl_source(tmp_path, "x", rows), shuffle=False, min_prompt_tokens=2, max_prompt_tokens=10)
    assert not caplog.messages
    assert ids(stream, 6) == ["x:2", "x:23"] * 3
    where = f"data.train.0.path = {tmp_path}/x.jsonl: skipped"
    assert caplog.messages == [
        f"{where} too_short row 1, 1 tokens, data.min_prompt_tokens = 2",
        *(f"{where} over_long row {row}, {row + 17} tokens, data.max_prompt_tokens = 10" for row in range(3, 7)),
        f"{where} over_long row 7, 24 tokens, data.max_prompt_tokens = 10; more are only counted",
    ]
    assert stream.counters()["data/skipped_over_long"] == 20


def test_a_source_whose_prompts_are_all_too_long(tmp_path: Path):
    source = jsonl_source(tmp_path, "x", numbered(3))
    with pytest.raises(ConfigError) as caught:
        open_stream(source, max_prompt_tokens=4)
    assert str(caught.value).startswith(
        f"data.train.0.path = {source.path}: gives no usable prompt (3 over_long rows (1, 2, 3), the first with 9 "
        "tokens, data.max_prompt_tokens = 4)"
    )


def test_bounded_epochs_end(tmp_path: Path):
    sources = [
        jsonl_source(tmp_path, "a", numbered(6), weight=2.0),
        jsonl_source(tmp_path, "b", numbered(5, first=20), weight=1.0),
    ]
    stream = open_stream(*sources, epochs=2)
    assert stream.most_prompts == 18
    drawn = Counter(ids(stream, 17))
    assert max(drawn.values()) == 2
    with pytest.raises(EndOfPrompts) as caught:
        stream.next(5)
    assert str(caught.value) == (
        f"data.epochs = 2: the prompts of data.train.0.path = {sources[0].path} have been drawn that often; allow more "
        "epochs, or end the run earlier with num_steps"
    )
    assert open_stream(*sources).most_prompts == float("inf")


def test_the_first_prompts_of_every_source(mixture: list):
    first = open_stream(*mixture, **OPTIONS).first_prompts
    assert {name: len(prompts) for name, prompts in first.items()} == {"file": 11, "table": 5, "sums": 6}
    assert [prompt.id for prompt in islice(first["table"], 2)] == ["table:0", "table:1"]


CHANGES: dict[str, tuple[Any, str]] = {
    "a row more": (lambda folder: write_jsonl(folder / "x.jsonl", numbered(21)), "data.train = ['x: "),
    "another answer": (
        lambda folder: write_jsonl(folder / "x.jsonl", [*numbered(19), {"prompt": "problem 19", "answer": "?"}]),
        "data.train = ['x: ",
    ),
    "another order": ({"shuffle": False}, "data.shuffle = False: the checkpoint was written with True"),
    "another limit": ({"max_prompt_tokens": 50}, "data.max_prompt_tokens = 50: the checkpoint was written with 2048"),
    "another split": ({"held_out": 3}, "data.held_out = 3: the checkpoint was written with None"),
    "another seed": ({"seed": 8}, "seed = 8: the checkpoint was written with 1"),
    "other tokens": (
        {"prompt_format": "chat"},
        "data.train = ['x: ",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_of_other_prompts_is_refused(tmp_path: Path, name: str):
    source = jsonl_source(tmp_path, "x", numbered(20))
    state = open_stream(source).state_dict()
    change, message = CHANGES[name]
    options = change if isinstance(change, dict) else {}
    if not options:
        change(tmp_path)
    stream = open_stream(source, **options)
    expected = ids(open_stream(source, **options), 5)
    with pytest.raises(ConfigError) as caught:
        stream.load_state_dict(state)
    assert str(caught.value).startswith(message)
    assert "start a new run from the checkpoint's weights" in str(caught.value)
    assert ids(stream, 5) == expected


def test_a_state_of_another_mixture_is_refused(tmp_path: Path):
    sources = [jsonl_source(tmp_path, name, numbered(4, text=name), weight=2.0) for name in "ab"]
    state = open_stream(*sources).state_dict()
    lighter = jsonl_source(tmp_path, "b", numbered(4, text="b"), weight=1.0)
    for others in ([sources[0]], sources[::-1], [sources[0], lighter]):
        with pytest.raises(ConfigError, match=r"^data\.train = "):
            open_stream(*others).load_state_dict(state)
    open_stream(*sources).load_state_dict(state)


def test_the_log_says_how_each_source_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="megatron_fipo")
    gsm8k = [{"question": f"q{number}", "answer": f"so\n#### {number}"} for number in range(2)]
    own = [{"task": row["question"], "gold": row["answer"]} for row in gsm8k]
    sources = [
        jsonl_source(tmp_path, "a", [*numbered(3), *numbered(2)]),
        jsonl_source(tmp_path, "b", gsm8k),
        ParquetPrompts(
            path=write_parquet(tmp_path / "c.parquet", own),
            prompt_field="task",
            answer_field="gold",
            answer_pattern="is (.*)",
        ),
    ]
    with pytest.raises(ConfigError) as caught:
        open_stream(*sources)
    assert str(caught.value).startswith(
        "data.train.2.answer_pattern = is (.*): gives no usable prompt (2 no_answer rows"
    )
    assert "the columns are task, gold" in str(caught.value)
    assert [message.partition(" = ")[2] for message in caplog.messages] == [
        f"{tmp_path}/a.jsonl: read as prompt and answer; 5 rows, 3 of them usable",
        f"{tmp_path}/a.jsonl: skipped 2 duplicate rows (4, 5), the first with the prompt of a:1",
        f"{tmp_path}/b.jsonl: read as GSM8K (question, answer after ####); 2 rows, 2 of them usable",
    ]
    sources[2] = ParquetPrompts(path=tmp_path / "c.parquet", prompt_field="task", answer_field="gold")
    caplog.clear()
    with pytest.raises(ConfigError, match="2 duplicate rows"):
        open_stream(*sources)
