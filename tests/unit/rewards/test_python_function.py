"""A user's function: where it is looked for, and what it may ask for."""

import importlib
import sys
from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.rewards.base import Response
from megatron_fipo.rewards.python_function import ARGUMENTS, PythonFunction

SOURCE = """
import asyncio
from dataclasses import dataclass

number = 3
largest = max

def response_only(response): return len(response)
def keyword_only(*, answer: str | None, num_tokens): return num_tokens if answer == "34" else 0
def with_default(response, scale=2.0): return scale
def everything(**arguments): return len(arguments)
def all_arguments(response, prompt, answer, metadata, finish_reason, num_tokens):
    return float((response, prompt, answer, metadata, finish_reason, num_tokens) == (
        "text", "question", "34", {"level": 5}, "stop", 7))
def nothing(): return 1
def asks_for_more(response, tokenizer): return 0
def positional(response, /): return 0
async def later(response): return 0

@dataclass
class Scale:
    factor: float
    def __call__(self, response): return self.factor * len(response)

scaled = Scale(0.5)
"""
RESPONSE = Response(text="text", num_tokens=7, prompt="question", reference="34", metadata={"level": 5})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("response_only", 4.0),
        ("keyword_only", 7.0),
        ("with_default", 2.0),
        ("everything", float(len(ARGUMENTS))),
        ("all_arguments", 1.0),
        ("nothing", 1.0),
        ("scaled", 2.0),
    ],
)
def test_a_function_gets_what_it_names(file: Path, name: str, score: float) -> None:
    assert PythonFunction.load(f"{file}:{name}", "f").grade(RESPONSE).score == score


def test_a_module_is_found_as_python_finds_it_and_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_mine.py").write_text("def reward(response): return 1\n")
    # A file in the working directory hides no library.
    (tmp_path / "fractions.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    assert PythonFunction.load("rewards_of_mine:reward", "f").grade(RESPONSE).score == 1.0
    monkeypatch.delitem(sys.modules, "fractions")
    assert importlib.import_module("fractions").Fraction(1, 2) == 0.5


ASK = ", ".join(ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("missing", "my rewards.py has no missing; correct the function's name"),
        ("number", "number is no plain function; name a function that returns a number"),
        ("Scale", "Scale is no plain function; name a function that returns a number"),
        ("later", "later is no plain function; name a function that returns a number"),
        ("asks_for_more", f"it asks for 'tokenizer'; name its parameters from {ASK}"),
        ("largest", "largest does not tell its parameters; write a Python function that calls it"),
        ("positional", f"it asks for 'response'; name its parameters from {ASK}"),
    ],
)
def test_functions_that_cannot_be_used(file: Path, name: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PythonFunction.load(f"{file}:{name}", "reward.terms.mine.function")
    assert str(caught.value).startswith(f"reward.terms.mine.function = {file}:{name}: ")
    assert str(caught.value).endswith(rule)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "FileNotFoundError"),
        ("def reward(:", "SyntaxError"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path: Path, content: str | None, problem: str) -> None:
    file = tmp_path / "reward.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="reward.py cannot be imported") as caught:
        PythonFunction.load(f"{file}:reward", "f")
    assert problem in str(caught.value)
