"""The example of a trainer of one's own: it learns, and keeps what its page promises."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_fipo.algorithms.losses import fipo_loss
from megatron_fipo.config.algorithm import FipoConfig
from tests.integration.test_quickstart_program import load_program

ROOT = Path(__file__).parents[2]
CONFIG = FipoConfig.preset("paper-v2", updates_per_rollout=4)


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program("examples/own_trainer/train.py")


def test_the_reward_rises() -> None:
    command = [sys.executable, "examples/own_trainer/train.py", "--steps", "16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rewards = [float(value) for value in re.findall(r"reward ([0-9.]+)", done.stdout)]
    assert len(rewards) == 16
    # A random model repeats the digit with one token in twelve, and often ends early.
    assert max(rewards[:3]) < 0.1
    assert min(rewards[-3:]) > 0.15


def test_a_response_counts_to_its_end(program: ModuleType) -> None:
    torch.manual_seed(0)
    model, tokenizer = program.tiny_model()
    rollout = program.sample_responses(model, tokenizer, ["3=", "14="] * 40)
    responses = rollout.token_ids[:, rollout.prompt_length :].tolist()
    assert rollout.response_mask.sum(1).tolist() == [
        response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
        for response in responses
    ]
    assert len(set(rollout.response_mask.sum(1).tolist())) > 4


def test_padding_does_not_show_in_log_probs(program: ModuleType) -> None:
    torch.manual_seed(0)
    model, tokenizer = program.tiny_model()
    rollout = program.sample_responses(model, tokenizer, ["3=", "14="] * 8)
    with torch.no_grad():
        padded = program.response_log_probs(model, rollout, torch.arange(16))
        for row in range(16):
            token_ids = rollout.token_ids[row][rollout.attention_mask[row].bool()]
            length = int(rollout.response_mask[row].sum())
            expected = (
                model(token_ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, token_ids[1:, None])[-length:, 0]
            )
            torch.testing.assert_close(padded[row, :length], expected, rtol=0, atol=1e-5)


def test_the_first_update_of_a_rollout_finds_the_policy_unmoved(program: ModuleType) -> None:
    torch.manual_seed(0)
    model, tokenizer = program.tiny_model()
    rollout = program.sample_responses(model, tokenizer, ["3=", "14="] * 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = program.update(model, optimizer, CONFIG, rollout, torch.randn(32))
    assert metrics["train/ratio_max"] == 1.0
    assert metrics["fipo/future_kl_square_mean"] == 0.0


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    old, advantages = torch.randn(6, 40, dtype=torch.float64), torch.randn(6)
    mask = torch.arange(40) < torch.tensor([[40], [3], [17], [40], [1], [29]])
    log_probs = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    fipo_loss(log_probs, old, advantages, mask, CONFIG).loss.backward()
    whole, log_probs.grad = log_probs.grad.clone(), None
    count = 0
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        result = fipo_loss(log_probs[rows], old[rows], advantages[rows], mask[rows], CONFIG)
        (result.loss * result.loss_mask.sum()).backward()
        count += result.loss_mask.sum()
    torch.testing.assert_close(log_probs.grad / count, whole, rtol=1e-12, atol=0)


def test_the_trl_trainer_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "own_trainer"))
    program = load_program("examples/own_trainer/trl_trainer.py")
    rewards = [line["reward"] for line in program.main(str(tmp_path), rollouts=16) if "reward" in line]
    assert rewards[0] < 0.1 and rewards[-1] > 0.15
