"""docs/data.md: its configurations load, its rows are rows, and its reasons are those that are counted."""

import re
from pathlib import Path
from typing import get_args

import pytest

from megatron_fipo.config.base import config_class
from megatron_fipo.config.data import DataConfig, JsonlPrompts
from megatron_fipo.config.load import load_config
from megatron_fipo.data.jsonl import JsonlRows
from megatron_fipo.data.problem import SkipReason

TEXT = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
CONFIGURATIONS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@config_class
class Root:
    """The section alone."""

    data: DataConfig
    """Prompts."""


@pytest.mark.parametrize("text", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_configurations_load(tmp_path: Path, text: str):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    assert load_config(Root, path).data.train


def test_there_are_configurations():
    assert len(CONFIGURATIONS) == 6


def test_the_rows_are_usable(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    (rows,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    path.write_text(rows)
    opened = JsonlRows(JsonlPrompts(path=path), "data.train")
    assert [opened.read(int(place)).answer for place in opened.index.usable] == ["42", "4"]
    assert len(opened.index.usable) == len(rows.splitlines())


def test_every_reason_is_described():
    table = TEXT[TEXT.index("| reason |") :].partition("\n\n")[0]
    assert {reason for row in table.splitlines()[2:] for reason in re.findall(r"`(\w+)`", row.split("|")[1])} == set(
        get_args(SkipReason)
    )
