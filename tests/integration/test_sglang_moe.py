"""A run of a mixture of experts whose routing at a real SGLang server is replayed by the trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.rollout.journal import JournalEntry, journal_path, read_journal
from megatron_fipo.types import Prompt, Sample
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import prompts, read_lines, run_in_turn, small_run, write_inputs
from tests.sglang_servers import needs_sglang
from tests.tiny_models import write_tiny_model

pytestmark = [pytest.mark.distributed, needs_sglang]

STEPS = 2
TOP_K = 2
# Experts whose logits lie closer than this may change places with the rounding of another kernel.
TIE = 1e-4


@dataclass(frozen=True)
class Outcome:
    config: RunConfig
    lines: list[dict[str, Any]]
    first: JournalEntry
    model: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two steps on two ranks that share the experts of every layer, with a server of its own."""
    root = write_inputs(tmp_path_factory.mktemp("sglang_moe"))
    model = write_tiny_model(root / "experts", "qwen3_moe")
    config = small_run(
        root,
        "replayed",
        num_steps=STEPS,
        data=prompts(root),
        model={"path": model, "dtype": "float32"},
        parallelism={"expert_model_parallel_size": 2},
        rollout={
            "engine": "sglang",
            "replay_routing": True,
            "sglang": SglangConfig(server_arguments={"max_total_tokens": 4096, "max_running_requests": 32}),
        },
    )
    ends = run_distributed(run_in_turn, 2, [config], timeout_s=500.0)
    assert [ended.error for (ended,) in ends] == [(), ()]
    folder = config.output_dir
    first = read_journal(journal_path(folder / "journal", 1))
    return Outcome(config, read_lines(folder / "metrics.jsonl"), first, model)


def own_routing(model: Any, prompt: Prompt, sample: Sample) -> tuple[Tensor, Tensor]:
    """A plain model's router logits [layers, tokens, experts], and its log-probabilities of the response."""
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, sample.response_token_ids]).astype(np.int64))
    with torch.no_grad():
        output = model(ids[None], output_router_logits=True)
    log_probs = output.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return torch.stack(output.router_logits), log_probs[-len(sample.response_token_ids) :]


def test_the_server_tells_the_experts_that_a_plain_model_chooses(outcome: Outcome) -> None:
    model = AutoModelForCausalLM.from_pretrained(outcome.model, dtype=torch.float32).eval()
    compared = 0
    for group in outcome.first.groups:
        for sample in group.samples:
            logits, _ = own_routing(model, group.prompt, sample)
            top = logits[:, :-1].topk(TOP_K + 1, dim=-1)
            experts = torch.from_numpy(sample.routed_experts.astype(np.int64)).transpose(0, 1)
            assert experts.shape == (*logits[:, :-1].shape[:2], TOP_K)
            clear = top.values[..., TOP_K - 1] - top.values[..., TOP_K] > TIE
            mine, theirs = top.indices[..., :TOP_K].sort(dim=-1).values, experts.sort(dim=-1).values
            assert torch.equal(mine[clear], theirs[clear])
            compared += int(clear.sum())
    assert compared > 500


def test_replay_leaves_no_more_mismatch_than_own_routing(outcome: Outcome) -> None:
    model = AutoModelForCausalLM.from_pretrained(outcome.model, dtype=torch.float32).eval()
    deltas = [
        np.abs(own_routing(model, group.prompt, sample)[1].numpy() - sample.rollout_log_probs)
        for group in outcome.first.groups
        for sample in group.samples
    ]
    steps = outcome.lines[1:]
    assert [line["step"] for line in steps] == [1, 2]
    assert steps[0]["train/mismatch_mean_abs"] <= np.concatenate(deltas).mean() + 1e-6
    for line in steps:
        assert line["train/mismatch_max"] < 1e-4
        assert line["train/routing_mismatch_fraction"] < 1e-2
        assert line["rollout/canary_mismatch_max"] <= 1e-4


def test_the_experts_are_gone_after_the_step(outcome: Outcome) -> None:
    assert list(outcome.config.output_dir.rglob("*.routing")) == []
