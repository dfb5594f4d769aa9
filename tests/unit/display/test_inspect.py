"""`megatron-fipo inspect` on run directories made by hand."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.cli import main
from megatron_fipo.config.base import ConfigError
from megatron_fipo.display.inspect import inspect
from megatron_fipo.display.token_file import save_tokens, token_path
from tests.unit.display.records import make_records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps; samples and token records of the second; the line of a third is being written."""
    folder = tmp_path / "arithmetic"
    folder.mkdir()
    steps = [
        {"step": 0, "eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.3},
        {"step": 1, "rollout/reward_mean": 0.3125, "train/loss": None, "train/entropy": 0.5},
        {"step": 2, "rollout/reward_mean": 0.4375, "train/loss": -0.01, "fipo/influence_weight_mean": 1.01},
    ]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 3, "rollout/rew')
    samples = [
        {"step": 2, "sequence": sequence, "prompt_id": f"train:{sequence}", "prompt": "3+4=", "response": text}
        | {"reward": reward, "answer": "7", "finish_reason": "stop", "response_tokens": 3}
        for sequence, text, reward in ((0, "3+4=7", 1.0), (8, "no\x1b[2J!\nend", 0.0), (16, "unseen", 0.0))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples) + '{"step": 3')
    save_tokens(make_records(), token_path(folder, 2))
    return folder


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert inspect([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_without_a_step_all_whole_steps_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, run).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]
    assert lines[2].split()[1:] == ["0.250", "(0.200", "to", "0.300)"]
    assert lines[4].split()[1:] == ["0.438", "-0.0100", "1.0100"]


def test_updates_that_were_kept_are_listed_with_what_they_are_about(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, text in ((1, "the loss is nan\x1b[2J"), (2, "")):
        folder = run / "dumps" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "dump.json").write_text(json.dumps({"place": {"update": 3}, "fault": {"text": text}}))
    (run / "dumps" / "step_3").mkdir()
    (run / "dumps" / "step_3" / "dump.json").write_text("{}")
    assert shown(capsys, run).splitlines()[-2:] == [
        "dumps/step_1, update 3: the loss is nan·[2J",
        "dumps/step_2, update 3: asked for",
    ]


def test_a_step_lists_its_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, run, "--step", 2)
    rows = out.splitlines()[-3:]
    assert [row.split()[:5] for row in rows] == [
        ["0", "1.000", "3", "stop", "yes"],
        ["1", "0.000", "3", "stop", "yes"],
        ["2", "0.000", "3", "stop", "no"],
    ]
    assert "no·[2J!⏎end" in rows[1]


def test_a_response_is_shown_with_its_readings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, run, "--step", 2, "--sample", 0, "--show", "all")
    assert "prompt train:0, reward 1.000, answer 7" in out
    assert "update 1, advantage +0.7500, in the loss; 3 response tokens" in out
    assert out.count("\n3+4=7\n") == 3
    assert "strongest  2:'=7' -0.5, 1:'4' 0.25\n" in out
    assert "strongest  0:'3+' 0.8, 1:'4' 0.9\n" in out
    assert "in this response from 0.8 to 1" in out
    assert "\x1b" not in out


def test_one_reading_is_the_weight_unless_asked_otherwise(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = shown(capsys, run, "--step", 2, "--sample", 0)
    assert "influence weight" in weight
    assert "Future-KL" not in weight
    assert "Future-KL" in shown(capsys, run, "--step", 2, "--sample", 0, "--show", "future_kl")


def test_a_dropped_sequence_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "update 3, advantage -1.5000, dropped from the loss" in shown(capsys, run, "--step", 2, "--sample", 1)


def test_the_table_has_every_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, run, "--step", 2, "--sample", 1, "--table")
    assert out.splitlines()[-2].split() == ["0", "no", "-2.50000", "+1.50000", "+1.25000", "+1.20000", "+0.20000"]


def test_colours_say_how_far_and_which_way(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = shown(capsys, run, "--step", 2, "--sample", 0, "--show", "log_ratio")
    line = next(line for line in out.splitlines() if re.sub(r"\x1b\[[\d;]*m", "", line) == "3+4=7")
    # Half of the largest distance upwards, then the largest downwards; the first token did not move.
    assert line == "3+\x1b[30;48;2;214;96;77m4\x1b[0m\x1b[97;48;2;33;102;172m=7\x1b[0m".replace("97;48", "37;48")
    for words in (["--no-color"], []):
        if not words:
            monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in shown(capsys, run, "--step", 2, "--sample", 0, *words)


def test_a_sample_without_records_is_shown_as_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, run, "--step", 2, "--sample", 2)
    assert "not recorded token by token" in out
    assert out.endswith("unseen\n")


def test_a_run_without_tokenizer_shows_ids(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "samples.jsonl").unlink()
    save_tokens(make_records(pieces=None), token_path(run, 2))
    assert len(shown(capsys, run, "--step", 2).splitlines()) == 4
    assert "‹11›‹12›‹13›" in shown(capsys, run, "--step", 2, "--sample", 0)


def test_numbers_that_are_not_finite_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = make_records()
    broken = np.array([np.nan, np.inf, 0.1, 0, 0], dtype=np.float32)
    save_tokens(dataclasses.replace(records, log_ratio=broken), token_path(run, 2))
    assert "3+4=7" in shown(capsys, run, "--step", 2, "--sample", 0, "--show", "log_ratio")


BAD_WORDS = {
    "no such folder": (["{run}/absent"], "RUN = {run}/absent: must be a run directory, and does not exist"),
    "no run": (["{run}/tokens"], "RUN = {run}/tokens: must be a run directory, and has no metrics.jsonl"),
    "a missing step": (["{run}", "--step", "7"], "--step = 7: {run} has no such step; it has 0 to 2"),
    "a missing sample": (
        ["{run}", "--step", "2", "--sample", "3"],
        "--sample = 3: step 2 of {run} has no such sample; it has 0 to 2",
    ),
    "a negative sample": (
        ["{run}", "--step", "1", "--sample=-1"],
        "--sample = -1: step 1 of {run} has no such sample; it has none",
    ),
    "a sample of no step": (["{run}", "--sample", "1"], "--sample = 1: samples are counted within a step"),
}


@pytest.mark.parametrize("kind", BAD_WORDS)
def test_what_is_not_there_is_told(run: Path, kind: str) -> None:
    words, message = BAD_WORDS[kind]
    with pytest.raises(ConfigError, match=re.escape(message.format(run=run))):
        inspect([word.format(run=run) for word in words])


def test_damaged_records_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = token_path(run, 2)
    path.write_bytes(path.read_bytes()[:100])
    assert main(["inspect", str(run), "--step", "2"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"megatron-fipo: --step = 2: {path} cannot be read as token records")
    assert message.count("\n") == 1


def test_it_works_without_the_training_libraries(run: Path) -> None:
    blocked = ("torch", "megatron", "transformers", "tokenizers", "pydantic", "tyro", "yaml")
    program = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "from megatron_fipo.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, "inspect", str(run), "--step", "2", "--sample", "0"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "3+4=7" in done.stdout
