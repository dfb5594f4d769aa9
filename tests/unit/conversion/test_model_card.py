"""The card of an export, as the hub reads it."""

import yaml

from megatron_fipo.conversion.model_card import ModelCard
from megatron_fipo.conversion.model_files import model_name

METRICS = [
    {"step": 0, "eval/accuracy": 0.25, "eval/accuracy_low": 0.1, "eval/accuracy_high": 0.4, "eval/num_problems": 8},
    {"step": 1, "train/loss": 0.123456, "time/update_s": 3.0},
    {"step": 2, "train/loss": None, "train/updates": 2, "rollout/reward_mean": 0.5, "train/loss_by_update": [1, 2]},
]


def front_matter(text: str) -> dict[str, object]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_a_card_of_a_run() -> None:
    card = ModelCard(
        base_model="Qwen/Qwen2.5-7B",
        step=2,
        dtype="bfloat16",
        algorithm="fipo: official-7b\n  clip_low = 0.2\n",
        metrics=METRICS,
        proof=["every tensor is the same"],
    )
    text = card.text()
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-7B",
        "tags": ["megatron-fipo", "reinforcement-learning", "fipo"],
    }
    assert "```text\nfipo: official-7b\n  clip_low = 0.2\n```" in text
    assert "| 0 | 0.25 | 0.1 | 0.4 | 8 |" in text
    assert "## Metrics of step 2\n\n| metric | value |\n|---|---|\n| `train/updates` | 2 |\n" in text
    assert "| `rollout/reward_mean` | 0.5 |" in text
    assert "`time/" not in text and "loss_by_update" not in text
    assert text.endswith("- every tensor is the same\n")


def test_a_card_of_weights_that_nobody_trained() -> None:
    text = ModelCard(base_model="my model", step=0, dtype="float32").text()
    assert "base_model" not in front_matter(text), "the hub knows no such name"
    assert "The weights of `my model`, converted by megatron-fipo" in text
    assert "##" not in text


def test_names_of_models(tmp_path) -> None:
    cached = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B" / "snapshots" / "8a7b"
    cached.mkdir(parents=True)
    assert model_name(cached) == "Qwen/Qwen2.5-7B"
    (tmp_path / "mine").symlink_to(cached)
    assert model_name(tmp_path / "mine") == "Qwen/Qwen2.5-7B"
    assert model_name(tmp_path) == tmp_path.name
