"""Recorded rollout batches for tests: real samples of a tiny model, with rewards drawn at random."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.rollout.batch import batch_path, build_train_batch, save_batch
from megatron_fipo.rollout.decoding import decode
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParameters
from megatron_fipo.types import Prompt, RolloutGroup, Sample
from tests.tiny_models import EOS_TOKEN_ID


def record_batch(
    model_folder: Path,
    folder: Path,
    algorithm: AlgorithmConfig,
    *,
    num_groups: int = 8,
    group_size: int = 4,
    max_tokens: int = 40,
    seed: int = 0,
) -> Path:
    """Sample ragged groups from the model, give them random 0/1 rewards, and record them as step 1 in `folder`."""
    draws = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    groups = []
    for number in range(num_groups):
        prompt = Prompt(
            id=f"p{number}", token_ids=draws.integers(0, 256, int(draws.integers(3, 12))).astype(np.int32), text=""
        )
        # Lengths are capped at random: a random model hardly ever ends a response by itself.
        requests = [
            GenerationRequest(
                prompt_id=prompt.id,
                sample_index=index,
                prompt_token_ids=prompt.token_ids,
                seed=1000 * number + index,
                sampling=SamplingParameters(
                    temperature=1.0, top_p=1.0, max_tokens=max_tokens, stop_token_ids=(EOS_TOKEN_ID,)
                ),
            )
            for index in range(group_size)
        ]
        group = RolloutGroup(prompt=prompt, samples=[])
        for index, result in enumerate(decode(model, requests, policy_version=0)):
            length = int(draws.integers(1, len(result.token_ids) + 1))
            group.samples.append(
                Sample(
                    prompt_id=prompt.id,
                    sample_index=index,
                    response_token_ids=result.token_ids[:length],
                    rollout_log_probs=result.log_probs[:length],
                    finish_reason="length",
                    policy_version=0,
                    reward=float(draws.integers(0, 2)),
                )
            )
        # Every group has a signal.
        group.samples[0].reward, group.samples[1].reward = 1.0, 0.0
        groups.append(group)
    path = batch_path(folder, 1)
    save_batch(build_train_batch(groups, algorithm, temperature=1.0), path)
    return path
