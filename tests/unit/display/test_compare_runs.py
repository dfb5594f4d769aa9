"""tools/compare_runs.py on run directories made by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests.tool_modules import load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("compare_runs")


def write_run(folder: Path, steps: Sequence[Mapping[str, Any]], ending: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"step": number, **step}) + "\n" for number, step in enumerate(steps))
    (folder / "metrics.jsonl").write_text(lines + ending)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A finished FIPO run, and a DAPO run without influence weights whose third line is being written."""
    fipo = [
        {"eval/accuracy": 0.2, "eval/accuracy_low": 0.1, "eval/accuracy_high": 0.3},
        {"rollout/reward_mean": 0.3, "fipo/influence_weight_mean": 1.02, "train/loss": None},
        {"rollout/reward_mean": 0.5, "fipo/influence_weight_mean": 1.01, "train/loss": 0.25},
        {"rollout/reward_mean": 0.4, "eval/accuracy": 0.6, "eval/accuracy_low": 0.5, "eval/accuracy_high": 0.7},
    ]
    dapo = [{}, {"rollout/reward_mean": 0.25}]
    return [
        write_run(tmp_path / "one" / "arithmetic", fipo),
        write_run(tmp_path / "two" / "arithmetic", dapo, '{"step": 2, "rollout/rew'),
    ]


def table(capsys: pytest.CaptureFixture[str]) -> dict[str, list[list[str]]]:
    """Rows below every metric."""
    rows: dict[str, list[list[str]]] = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        if line.startswith("  "):
            rows[list(rows)[-1]].append(line.split())
        else:
            rows[line.strip()] = []
    return rows


def test_numbers_stand_side_by_side(tool: ModuleType, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*map(str, runs), "--last", "2"]) == 0
    assert table(capsys) == {
        "eval/accuracy": [
            ["one/arithmetic", "3", "0.2", "0.6", "3", "0.6", "0.4"],
            ["two/arithmetic", "1", "–", "–", "–", "–", "–"],
        ],
        "rollout/reward_mean": [
            ["one/arithmetic", "3", "0.3", "0.5", "2", "0.4", "0.45"],
            ["two/arithmetic", "1", "0.25", "0.25", "1", "0.25", "0.25"],
        ],
        "fipo/influence_weight_mean": [
            ["one/arithmetic", "3", "1.02", "–", "–", "1.01", "1.015"],
            ["two/arithmetic", "1", "–", "–", "–", "–", "–"],
        ],
    }


def test_metrics_can_be_chosen(tool: ModuleType, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*map(str, runs), "--metrics", "train/loss"]) == 0
    assert table(capsys)["train/loss"][0] == ["one/arithmetic", "3", "0.25", "–", "–", "0.25", "0.25"]


def test_the_drawing_has_a_panel_for_every_metric(tool: ModuleType, runs: list[Path], tmp_path: Path) -> None:
    sizes = []
    for number, metrics in enumerate((["eval/accuracy"], ["eval/accuracy", "train/loss", "rollout/reward_mean"])):
        path = tmp_path / f"{number}.png"
        assert tool.main([*map(str, runs), "--metrics", *metrics, "--output", str(path)]) == 0
        image = imread(path)
        assert np.ptp(image[..., :3]) > 0.5, "not one colour"
        sizes.append(image.shape[:2])
    assert sizes[1] == (2 * sizes[0][0], 2 * sizes[0][1])


def test_an_interval_is_a_band(tool: ModuleType, runs: list[Path]) -> None:
    figure, axis = tool.pyplot.subplots()
    tool._draw_metric(axis, {"one": tool.RunFiles(runs[0])}, "eval/accuracy")
    (band,) = axis.collections
    corners = {(round(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.1), (0, 0.3), (3, 0.5), (3, 0.7)}
    tool.pyplot.close(figure)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{one}", "{root}/absent"], "RUN = {root}/absent: must be a run directory, and does not exist"),
        (["{one}", "{one}"], "RUN = {one}: is given twice"),
        (
            ["{one}", "--metrics", "eval/acuracy"],
            "--metrics = eval/acuracy: no run has this metric; did you mean eval/acc",
        ),
        (["{one}", "--output", "{root}/no/such.png"], "--output = {root}/no/such.png: cannot be written"),
        (["{one}", "--output", "{root}/plot.xyz"], "--output = {root}/plot.xyz: cannot be written"),
    ],
)
def test_bad_input_is_told(
    tool: ModuleType,
    runs: list[Path],
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"one": runs[0], "root": tmp_path}
    assert tool.main([word.format(**places) for word in words]) == 2
    assert capsys.readouterr().err.startswith(f"compare_runs: {message.format(**places)}")
