"""The quickstart's own program: problems, teacher, tokenizer, cache."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]


def load_program(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load_program("examples/tiny_cpu/make_model.py")


def test_quickstart_problems_are_split_and_right(quickstart: ModuleType, tmp_path: Path) -> None:
    recipe = quickstart.Recipe(seed=3)
    sides = {}
    for name, held_out, count in (("train", False, 512), ("eval", True, 512)):
        path = tmp_path / name
        quickstart.write_problems(path, recipe, random.Random(1), count, held_out=held_out)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        sides[name] = {row["prompt"] for row in rows}
        assert len(sides[name]) == count
        for row in rows:
            assert row["answer"] == str(eval(row["prompt"].rstrip("=")) % 10)
    assert not sides["train"] & sides["eval"]


def test_quickstart_teacher_errs_on_carries_alone(quickstart: ModuleType) -> None:
    rng = random.Random(0)
    assert quickstart.teacher_answer([7, 5, 8], rng, carry_error=0.0) == "7+5=2;2+8=0;#0"
    assert quickstart.teacher_answer([7, 5, 8], rng, carry_error=1.0) == "7+5=3;3+8=2;#2"
    assert quickstart.teacher_answer([1, 2, 3], rng, carry_error=1.0) == "1+2=3;3+3=6;#6"


def test_quickstart_tokenizer_survives_loading(quickstart: ModuleType, tmp_path: Path) -> None:
    tokenizer = quickstart.make_tokenizer()
    model = quickstart.make_model(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "7+5=2;#2"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert len(loaded.encode(text)) == len(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert max(loaded.get_vocab().values()) < model.config.vocab_size


def test_quickstart_folder_is_made_once(quickstart: ModuleType, tmp_path: Path) -> None:
    recipe = quickstart.Recipe(seed=1)
    assert not quickstart.is_made(tmp_path, recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(quickstart.fingerprint(recipe)))
    assert quickstart.is_made(tmp_path, recipe)
    assert not quickstart.is_made(tmp_path, quickstart.Recipe(seed=2))
