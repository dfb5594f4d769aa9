"""The algorithm section as a user writes it: in a file, on the command line, in the help, and checked before a run."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_fipo.cli import main
from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.config.algorithm_card import effective_algorithm
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.help import help_text
from megatron_fipo.config.load import dump_config, load_config
from megatron_fipo.config.rollout_correction import RolloutCorrectionConfig
from megatron_fipo.config.run import RunConfig

SECTIONS = {section.__dataclass_fields__["type"].default: section for section in get_args(AlgorithmConfig)}
# What has to be given, and a field that no other algorithm has or that has another default there.
GIVEN: dict[str, dict[str, Any]] = {name: {"length_divisor": 512} if name == "dr_grpo" else {} for name in SECTIONS}
CHANGED: dict[str, tuple[str, Any]] = {
    "fipo": ("decay_half_life_tokens", 64.0),
    "dapo": ("clip_high", 0.3),
    "grpo": ("clip_high", 0.3),
    "dr_grpo": ("length_divisor", 1024),
    "gspo": ("clip_low", 1e-3),
    "cispo": ("weight_high", 4.0),
    "sapo": ("temperature_negative", 1.5),
    "gmpo": ("log_clip_high", 0.6),
}


def write_file(folder: Path, algorithm: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"output_dir: {folder / 'out'}\nnum_steps: 1\nmodel: {{path: model}}\nparallelism: "
        f"{{max_tokens_per_micro_batch: 32768}}\ndata: {{train: {{type: jsonl, path: train.jsonl}}}}\n{algorithm}\n"
    )
    return path


def test_every_algorithm_is_tried_here() -> None:
    assert set(CHANGED) == set(SECTIONS)
    assert all(field in SECTIONS[name].__dataclass_fields__ for name, (field, _) in CHANGED.items())


@pytest.mark.parametrize("name", SECTIONS)
def test_a_file_names_the_algorithm_and_comes_back_from_its_dump(name: str, tmp_path: Path) -> None:
    field, value = CHANGED[name]
    fields = {"type": name, **GIVEN[name], field: value}
    text = ", ".join(f"{key}: {entry}" for key, entry in fields.items())
    config = load_config(RunConfig, write_file(tmp_path, f"algorithm: {{{text}}}"))
    assert config.algorithm == SECTIONS[name](**{**GIVEN[name], field: value})
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert load_config(RunConfig, tmp_path / "dump.yaml") == config
    assert effective_algorithm(config.algorithm).startswith(f"{name}: ")


@pytest.mark.parametrize("name", SECTIONS)
def test_the_command_line_chooses_the_algorithm_and_its_fields(name: str, tmp_path: Path) -> None:
    field, value = CHANGED[name]
    words = [f"--algorithm.{field}", str(value), "--algorithm.type", name]
    words += [f"--algorithm.{key}={entry}" for key, entry in GIVEN[name].items() if key != field]
    config = load_config(RunConfig, write_file(tmp_path, ""), words)
    assert config.algorithm == SECTIONS[name](**{**GIVEN[name], field: value})


@pytest.mark.parametrize("name", SECTIONS)
def test_the_help_lists_every_field_of_the_algorithm(name: str) -> None:
    lines = help_text(RunConfig, "megatron-fipo train", width=200).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"algorithm (type {name}):"))
    end = next((index for index in range(start + 1, len(lines)) if not lines[index].startswith("  ")), len(lines))
    options = {line.split()[0] for line in lines[start:end] if line.startswith("  --")}
    own = {field.name for field in dataclasses.fields(SECTIONS[name])} - {"rollout_correction"}
    assert options == {f"--algorithm.{field}" for field in own}


def test_the_help_lists_the_section_that_algorithms_share_once() -> None:
    lines = help_text(RunConfig, "megatron-fipo train", width=200).splitlines()
    assert sum(line.startswith("algorithm.rollout_correction:") for line in lines) == 1
    assert sum("--algorithm.rollout_correction." in line for line in lines) == 4


def test_a_correction_is_written_in_a_file_and_changed_on_the_command_line(tmp_path: Path) -> None:
    file = write_file(tmp_path, "algorithm: {type: dapo, rollout_correction: {kind: mask, low: 0.5, high: 5}}")
    config = load_config(RunConfig, file, ["--algorithm.rollout_correction.high", "3"])
    assert config.algorithm.rollout_correction == RolloutCorrectionConfig(kind="mask", low=0.5, high=3.0)
    with pytest.raises(ConfigError, match=r"algorithm\.rollout_correction\.high = 0\.5: must be at least 1"):
        load_config(RunConfig, file, ["--algorithm.rollout_correction.high", "0.5"])


@pytest.mark.parametrize("name", SECTIONS)
def test_check_accepts_the_algorithm(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--algorithm.{key}={entry}" for key, entry in GIVEN[name].items()]
    status = main(["check", str(write_file(tmp_path, f"algorithm: {{type: {name}}}")), *words])
    assert status == 0, capsys.readouterr().err


def test_dr_grpo_asks_for_its_divisor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length_divisor"):
        load_config(RunConfig, write_file(tmp_path, "algorithm: {type: dr_grpo}"))


@pytest.mark.parametrize(("name", "field"), [("cispo", "clip_low"), ("sapo", "dual_clip"), ("gspo", "weight_high")])
def test_a_field_of_another_algorithm_is_refused(name: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=field):
        load_config(RunConfig, write_file(tmp_path, f"algorithm: {{type: {name}, {field}: 0.5}}"))


def test_an_unknown_algorithm_is_refused_with_the_names_of_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(RunConfig, write_file(tmp_path, "algorithm: {type: ppo}"))
    assert all(name in str(error.value) for name in SECTIONS)
