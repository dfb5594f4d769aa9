"""Scored groups to one packed training batch, and batches to files and back."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_fipo.algorithms.advantages import group_relative_advantages
from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.config.base import ConfigError
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import RolloutGroup, TrainBatch

FORMAT_VERSION = 1

_ARRAYS = (
    "token_ids",
    "sequence_lengths",
    "prompt_lengths",
    "response_mask",
    "rollout_log_probs",
    "rewards",
    "advantages",
    "group_ids",
    "mini_batch_ids",
    "policy_versions",
)


class RecordedBatchError(RunError):
    """A recorded rollout batch that cannot be used."""


def build_train_batch(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig, temperature: float) -> TrainBatch:
    """Lay all samples end to end and add advantages and mini-batch numbers.

    Args:
        groups: Scored groups.
        algorithm: Says how advantages are normalised and how many updates there are.
        temperature: Sampling temperature.
    """
    samples = [(number, group, sample) for number, group in enumerate(groups) for sample in group.samples]
    prompt_lengths = np.array([len(group.prompt.token_ids) for _, group, _ in samples], dtype=np.int32)
    response_lengths = np.array([len(sample.response_token_ids) for _, _, sample in samples], dtype=np.int32)
    group_ids = np.array([number for number, _, _ in samples], dtype=np.int32)
    rewards = np.array([sample.reward for _, _, sample in samples], dtype=np.float32)
    token_ids, mask, log_probs = [], [], []
    for _, group, sample in samples:
        prompt, response = group.prompt.token_ids, sample.response_token_ids
        token_ids += [prompt, response]
        mask += [np.zeros(len(prompt), dtype=bool), np.ones(len(response), dtype=bool)]
        log_probs += [np.zeros(len(prompt), dtype=np.float32), sample.rollout_log_probs]
    batch = TrainBatch(
        token_ids=np.concatenate(token_ids).astype(np.int32),
        sequence_lengths=prompt_lengths + response_lengths,
        prompt_lengths=prompt_lengths,
        response_mask=np.concatenate(mask),
        rollout_log_probs=np.concatenate(log_probs).astype(np.float32),
        rewards=rewards,
        advantages=np.zeros_like(rewards),
        group_ids=group_ids,
        mini_batch_ids=np.zeros_like(group_ids),
        policy_versions=np.array([sample.policy_version for _, _, sample in samples], dtype=np.int32),
        temperature=temperature,
    )
    return assign_updates(batch, algorithm)


def assign_updates(batch: TrainBatch, algorithm: AlgorithmConfig) -> TrainBatch:
    """The batch with the algorithm's advantages, cut into its updates.

    Groups stay whole: update m of u takes groups m·n/u … (m + 1)·n/u of n.

    Raises:
        ConfigError: The groups cannot be shared evenly among the updates.
    """
    num_groups, updates = int(batch.group_ids.max()) + 1, algorithm.updates_per_rollout
    if num_groups % updates:
        raise ConfigError(
            field="algorithm.updates_per_rollout",
            value=updates,
            rule=f"must divide the {num_groups} groups of the rollout batch",
            way_out=f"choose a divisor of {num_groups}",
        )
    advantages = group_relative_advantages(
        torch.from_numpy(batch.rewards),
        torch.from_numpy(batch.group_ids),
        normalize_by_std=algorithm.normalize_advantages_by_std,
        epsilon=algorithm.advantage_epsilon,
    )
    return dataclasses.replace(
        batch,
        advantages=advantages.numpy(),
        mini_batch_ids=(batch.group_ids // (num_groups // updates)).astype(np.int32),
    )


def batch_path(folder: Path, step: int) -> Path:
    """File of a step's recorded batch."""
    return folder / f"rollout_{step:06d}.npz"


def save_batch(batch: TrainBatch, path: Path) -> None:
    """Write a batch as an npz file of plain arrays; it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            format_version=np.int64(FORMAT_VERSION),
            temperature=np.float64(batch.temperature),
            **{name: getattr(batch, name) for name in _ARRAYS},
        )
    partial.rename(path)


def load_batch(path: Path) -> TrainBatch:
    """Read a recorded batch; nothing is unpickled.

    Raises:
        RecordedBatchError: The file is missing, unreadable, of another format version, or its arrays disagree.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise RecordedBatchError(f"{path}: cannot be read as a recorded rollout batch ({error})") from error
    version = int(arrays.pop("format_version", -1))
    if version != FORMAT_VERSION:
        raise RecordedBatchError(f"{path}: format version {version}; this release reads {FORMAT_VERSION}")
    missing = [name for name in (*_ARRAYS, "temperature") if name not in arrays]
    if missing:
        raise RecordedBatchError(f"{path}: lacks {', '.join(missing)}")
    batch = TrainBatch(**{name: arrays[name] for name in _ARRAYS}, temperature=float(arrays["temperature"]))
    total = int(batch.sequence_lengths.sum())
    per_token = ("token_ids", "response_mask", "rollout_log_probs")
    wrong = [name for name in per_token if len(getattr(batch, name)) != total]
    per_sequence = set(_ARRAYS) - set(per_token)
    wrong += [name for name in sorted(per_sequence) if len(getattr(batch, name)) != batch.num_sequences]
    if wrong:
        raise RecordedBatchError(
            f"{path}: {', '.join(wrong)} do not fit {batch.num_sequences} sequences of {total} tokens"
        )
    return batch
