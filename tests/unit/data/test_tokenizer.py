import json

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.tokenizer import load_tokenizer, stop_token_ids
from tests.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    return tmp_path


def refusal(folder, vocab_size=VOCAB_SIZE) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(folder, vocab_size)
    return str(caught.value)


def test_loads_the_folders_tokenizer(folder):
    tokenizer = load_tokenizer(folder, VOCAB_SIZE)
    text = "Grüße, 世界!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 257


def test_the_last_row_of_the_embedding_may_be_used(folder):
    load_tokenizer(folder, EOS_TOKEN_ID + 1)
    message = refusal(folder, EOS_TOKEN_ID)
    assert message.startswith(f"model.path = {folder}: ")
    assert "reach 256" in message and "has 256 tokens" in message and "own tokenizer" in message


def test_an_added_token_counts(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    assert "reach 257" in refusal(folder, 257)


def test_missing_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "absent")


def test_missing_vocabulary_is_not_an_empty_one(folder):
    (folder / "tokenizer.json").unlink()
    message = refusal(folder)
    assert "tokenizer.json" in message and "fetch the model's tokenizer files" in message


def test_broken_tokenizer_file(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", ')
    assert "must hold a tokenizer that transformers can read" in refusal(folder)


def write_json(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def test_stop_tokens_of_all_places_in_order(folder):
    write_json(folder, "generation_config.json", eos_token_id=[7, EOS_TOKEN_ID])
    write_json(folder, "config.json", eos_token_id=5)
    assert stop_token_ids(folder, byte_tokenizer(), (9, 7)) == (7, EOS_TOKEN_ID, 5, 9)


@pytest.mark.parametrize("named", [None, EOS_TOKEN_ID, [EOS_TOKEN_ID]])
def test_stop_tokens_that_agree_are_one(folder, named):
    write_json(folder, "generation_config.json", eos_token_id=named)
    assert stop_token_ids(folder, byte_tokenizer()) == (EOS_TOKEN_ID,)


def test_stop_tokens_without_any_file(tmp_path):
    assert stop_token_ids(tmp_path, byte_tokenizer()) == (EOS_TOKEN_ID,)


def test_no_stop_token_at_all(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"^rollout.stop_token_ids = \(\): must name a token"):
        stop_token_ids(tmp_path, tokenizer)
    assert stop_token_ids(tmp_path, tokenizer, (0,)) == (0,)


@pytest.mark.parametrize("token_id", [-1, 257, 10**6])
def test_configured_stop_token_must_exist(tmp_path, token_id):
    with pytest.raises(ConfigError, match=f"^rollout.stop_token_ids = {token_id}: .* ids reach 256"):
        stop_token_ids(tmp_path, byte_tokenizer(), (token_id,))


@pytest.mark.parametrize("named", [257, [3, "</s>"], True, 1.5])
def test_the_models_stop_token_must_exist(folder, named):
    write_json(folder, "generation_config.json", eos_token_id=named)
    with pytest.raises(ConfigError, match=f"^model.path = {folder}: the stop token"):
        stop_token_ids(folder, byte_tokenizer())


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_unreadable_generation_config(folder, content):
    (folder / "generation_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="must hold a readable generation_config.json"):
        stop_token_ids(folder, byte_tokenizer())
