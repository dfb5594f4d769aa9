"""The checks of the data section, each with the sentence that it is told by."""

from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import DataConfig, default_name
from megatron_fipo.config.load import dump_config, load_config

MIXTURE = """
train:
  - {type: jsonl, path: a/problems.jsonl, weight: 3}
  - {type: parquet, path: b/problems.parquet, name: tables, answer_field: reward_model.ground_truth}
  - {type: reasoning_gym, task: chain_sum, weight: 0.5}
"""


def load(folder: Path, text: str, *overrides: str) -> DataConfig:
    path = folder / "data.yaml"
    path.write_text(text)
    return load_config(DataConfig, path, overrides)


def test_a_list_of_sources(tmp_path: Path):
    config = load(tmp_path, MIXTURE + "held_out: 0.02\nepochs: 3\n", "--train.1.weight", "2")
    assert isinstance(config.train, tuple)
    assert [source.weight for source in config.train] == [3.0, 2.0, 0.5]
    assert [source.name or default_name(source) for source in config.train] == ["problems", "tables", "chain_sum-0"]
    assert load(tmp_path, dump_config(config)) == config
    assert load(tmp_path, MIXTURE, "--held_out", "500").held_out == 500


def test_one_source_or_a_list_for_evaluation(tmp_path: Path):
    train = "train: {type: jsonl, path: t.jsonl}\n"
    one = load(tmp_path, train + "evaluation: {type: parquet, path: e.parquet}\n")
    assert one.has_evaluation and not isinstance(one.evaluation, tuple)
    several = load(tmp_path, train + "evaluation: [{type: jsonl, path: e.jsonl}, {type: jsonl, path: f.jsonl}]\n")
    assert isinstance(several.evaluation, tuple) and len(several.evaluation) == 2
    assert not load(tmp_path, train).has_evaluation
    assert load(tmp_path, train, "--held_out", "5").has_evaluation


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/train.jsonl", "train"), ("train-00 of 02.jsonl", "train-00_of_02"), ("données.jsonl", "donn_es")],
)
def test_a_source_is_named_after_its_file(tmp_path: Path, path: str, name: str):
    config = load(tmp_path, f"train: {{type: jsonl, path: '{path}'}}")
    assert not isinstance(config.train, tuple) and default_name(config.train) == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.0.weight", "5e-324"], "train.0.weight = 5e-324: must lie in [1e-9, 1e9]"),
        (["--train.0.weight", "0"], "train.0.weight = 0.0: must lie in [1e-9, 1e9]"),
        (["--train.0.weight", "-1"], "train.0.weight = -1.0: must lie in [1e-9, 1e9]"),
        (["--train.0.weight", ".inf"], "train.0.weight = inf: must lie in [1e-9, 1e9]"),
        (["--train.2.weight", ".nan"], "train.2.weight = nan: must lie in [1e-9, 1e9]"),
        (["--train.1.name", "problems"], "train.1.name = problems: is also the name of train.0"),
        (["--train.2.name", "tables"], "train.2.name = tables: is also the name of train.1"),
        (["--train.0.name", "a/b"], "train.0.name = a/b: must be made of letters, digits, dots, hyphens and"),
        (["--train.0.prompt_field", "a..b"], "train.0.prompt_field = a..b: must name a column"),
        (["--train.0.prompt_field", "answer"], "train.0.answer_field = answer: must differ from prompt_field"),
        (["--train.0.answer_pattern", "####"], "train.0.answer_pattern = ####: must have a group that holds the ref"),
        (["--train.0.answer_pattern", "("], "train.0.answer_pattern = (: must be a regular expression"),
        (["--train", "[]"], "train = []: must name at least one source"),
        (["--evaluation", "[]"], "evaluation = []: must name at least one source"),
        (["--held_out", "0.0"], "held_out = 0.0: must lie in (0, 1) to be a fraction"),
        (["--held_out", "1.0"], "held_out = 1.0: must lie in (0, 1) to be a fraction"),
        (["--held_out", ".nan"], "held_out = nan: must lie in (0, 1) to be a fraction"),
        (["--held_out", "0"], "held_out = 0: must be at least 1 to be a number of prompts"),
        (["--held_out", "-3"], "held_out = -3: must be at least 1 to be a number of prompts"),
        (["--epochs", "0"], "epochs = 0: must be at least 1"),
        (["--min_prompt_tokens", "0"], "min_prompt_tokens = 0: must lie in [1, max_prompt_tokens = 2048]"),
        (["--min_prompt_tokens", "3000"], "min_prompt_tokens = 3000: must lie in [1, max_prompt_tokens = 2048]"),
    ],
)
def test_values_that_cannot_be_used(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MIXTURE, *overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluation: {type: jsonl, path: e.jsonl, weight: 2}", "evaluation.weight = 2.0: has no meaning for"),
        (
            "evaluation: [{type: jsonl, path: e.jsonl}, {type: jsonl, path: f.jsonl, weight: 2}]",
            "evaluation.1.weight = 2.0: has no meaning for evaluation",
        ),
        (
            "evaluation: [{type: jsonl, path: a/e.jsonl}, {type: parquet, path: b/e.parquet}]",
            "evaluation.1.name = e: is also the name of evaluation.0, and results are told apart by it; give each",
        ),
        ("evaluation: {type: jsonl, path: e.jsonl}\nheld_out: 5", "held_out = 5: must be null where evaluation names"),
    ],
)
def test_evaluation_sources_that_cannot_be_used(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MIXTURE + text)
    assert str(caught.value).startswith(message)


def test_names_of_training_and_evaluation_may_be_the_same(tmp_path: Path):
    assert load(tmp_path, MIXTURE + "evaluation: {type: jsonl, path: other/problems.jsonl}").has_evaluation
