"""Scored groups to one packed training batch, and batches to files and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fipo.algorithms.advantages import group_relative_advantages
from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.config.run import RunConfig
from megatron_fipo.data.routing_file import write_routing_file
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.array_files import ArrayFileError, read_arrays
from megatron_fipo.runtime.files.disk_errors import disk_errors_told
from megatron_fipo.runtime.files.whole_file import whole_file
from megatron_fipo.types import PER_TOKEN_FIELDS, RolloutGroup, TrainBatch

FORMAT_VERSION = 2

# Types of a batch's arrays.
_TYPES = {
    "token_ids": np.int32,
    "response_mask": np.bool_,
    "rollout_log_probs": np.float32,
    "policy_versions": np.int32,
    "sequence_lengths": np.int32,
    "prompt_lengths": np.int32,
    "rewards": np.float32,
    "advantages": np.float32,
    "group_ids": np.int32,
    "mini_batch_ids": np.int32,
}


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
    lengths = prompt_lengths + response_lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1])
    token_ids = np.empty(total, dtype=np.int32)
    mask = np.zeros(total, dtype=bool)
    log_probs = np.zeros(total, dtype=np.float32)
    versions = np.full(total, -1, dtype=np.int32)
    for (_, group, sample), end in zip(samples, ends.tolist(), strict=True):
        begin = end - len(sample.response_token_ids)
        token_ids[begin - len(group.prompt.token_ids) : begin] = group.prompt.token_ids
        token_ids[begin:end] = sample.response_token_ids
        mask[begin:end] = True
        log_probs[begin:end] = sample.rollout_log_probs
        versions[begin:end] = sample.token_versions
    batch = TrainBatch(
        token_ids=token_ids,
        sequence_lengths=lengths,
        prompt_lengths=prompt_lengths,
        response_mask=mask,
        rollout_log_probs=log_probs,
        policy_versions=versions,
        rewards=rewards,
        advantages=np.zeros_like(rewards),
        group_ids=group_ids,
        mini_batch_ids=np.zeros_like(group_ids),
        temperature=temperature,
    )
    return assign_updates(batch, algorithm)


def with_routing(batch: TrainBatch, groups: Sequence[RolloutGroup], path: Path) -> TrainBatch:
    """The batch of these groups, and a file with the experts that the engine chose for its tokens.

    Args:
        batch: From `build_train_batch`.
        groups: The same groups.
        path: From `routing_path`, in a folder that all trainer nodes see.

    Raises:
        RoutingFileError: No sample has experts, or they do not fit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    routed = [sample.routed_experts for group in groups for sample in group.samples]
    write_routing_file(path, batch.sequence_lengths, routed)
    return dataclasses.replace(batch, routing_file=path)


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


def routing_path(path: Path) -> Path:
    """File of the experts that belong to a batch recorded at `path`."""
    return path.with_suffix(".routing")


def save_batch(batch: TrainBatch, path: Path, step: int | None = None) -> None:
    """Write a batch as an npz file of plain arrays; it appears complete or not at all.

    A routing file stays as it is: at `routing_path`, it is the recording's.

    Args:
        batch: The batch.
        path: The file.
        step: The step that it is recorded for, if for one.

    Raises:
        RunError: It cannot be written.
    """
    with disk_errors_told(path, "cannot be written", RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(batch, path, {} if step is None else {"step": np.int64(step)})


def _write(batch: TrainBatch, path: Path, told: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        np.savez(
            file,
            format_version=np.int64(FORMAT_VERSION),
            temperature=np.float64(batch.temperature),
            **told,
            **{name: getattr(batch, name) for name in _TYPES},
        )


def load_batch(path: Path, demand_finite: bool = True, step: int | None = None) -> TrainBatch:
    """Read a recorded batch; nothing is unpickled.

    Args:
        path: The file.
        demand_finite: Refuse rewards and log-probabilities that are not finite; false for the study of faults.
        step: The step that it is to be of, where the file tells; None for any.

    Raises:
        RecordedBatchError: The file is missing, unreadable, of another format version or step, or its arrays disagree.
    """
    try:
        arrays = read_arrays(path)
    except (ArrayFileError, OSError) as error:
        raise RecordedBatchError(f"{path}: cannot be read as a recorded rollout batch ({error})") from error
    version = _scalar(arrays, "format_version")
    if version != FORMAT_VERSION:
        raise RecordedBatchError(
            f"{path}: format version {version:g}; this release reads {FORMAT_VERSION}: record the rollouts anew"
        )
    if step is not None and "step" in arrays and (told := _scalar(arrays, "step")) != step:
        raise RecordedBatchError(
            f"{path}: was recorded for step {told:g} and is in the place of step {step}; bring back that step's, or "
            "record the rollouts anew"
        )
    missing = [name for name in _TYPES if name not in arrays]
    if missing:
        raise RecordedBatchError(f"{path}: lacks {', '.join(missing)}")
    wrong = [name for name, dtype in _TYPES.items() if arrays[name].dtype != dtype or arrays[name].ndim != 1]
    if wrong:
        raise RecordedBatchError(f"{path}: {', '.join(wrong)} are not one-dimensional arrays of the right type")
    values: dict[str, Any] = {name: arrays[name] for name in _TYPES}
    routing = routing_path(path)
    batch = TrainBatch(
        **values, temperature=_scalar(arrays, "temperature"), routing_file=routing if routing.exists() else None
    )
    problem = _find_disagreement(batch) or (_find_non_finite(batch) if demand_finite else None)
    if problem is not None:
        raise RecordedBatchError(f"{path}: {problem}")
    return batch


def _scalar(arrays: dict[str, np.ndarray], name: str) -> float:
    value = arrays.get(name)
    return float(value) if value is not None and value.shape == () and value.dtype.kind in "if" else float("nan")


def _find_disagreement(batch: TrainBatch) -> str | None:
    """What makes the arrays no batch, or None."""
    count, total = batch.num_sequences, int(batch.sequence_lengths.sum(dtype=np.int64))
    wrong = [name for name in _TYPES if len(getattr(batch, name)) != (total if name in PER_TOKEN_FIELDS else count)]
    if wrong:
        return f"{', '.join(wrong)} do not fit {count} sequences of {total} tokens"
    if not count:
        return "holds no sequence"
    if not (np.all(batch.prompt_lengths >= 1) and np.all(batch.prompt_lengths <= batch.sequence_lengths)):
        return "a prompt is empty, or longer than its sequence"
    places = np.arange(total) - np.repeat(batch.sequence_starts[:-1], batch.sequence_lengths)
    in_prompt = places < np.repeat(batch.prompt_lengths, batch.sequence_lengths)
    checks = {
        "response_mask holds tokens of a prompt": not np.any(batch.response_mask & in_prompt),
        "token_ids are negative": np.all(batch.token_ids >= 0),
        "policy_versions are not −1 on prompts and 0 or more on responses": np.all(
            np.where(in_prompt, batch.policy_versions == -1, batch.policy_versions >= 0)
        ),
        "group_ids do not count up from 0": batch.group_ids[0] == 0 and set(np.diff(batch.group_ids)) <= {0, 1},
        "temperature is not a positive number": 0 < batch.temperature < float("inf"),
    }
    return next((problem for problem, holds in checks.items() if not holds), None)


def _find_non_finite(batch: TrainBatch) -> str | None:
    """Which arrays hold numbers that are not finite, or None."""
    names = [name for name in ("rewards", "rollout_log_probs") if not np.all(np.isfinite(getattr(batch, name)))]
    return f"{', '.join(names)} are not finite" if names else None


def load_recorded(path: Path, config: RunConfig, vocab_size: int, step: int | None = None) -> TrainBatch:
    """Read a recorded batch for a run, with the run's advantages and updates.

    Args:
        path: The recording.
        config: The run.
        vocab_size: Tokens of the run's model.
        step: See `load_batch`.

    Raises:
        RecordedBatchError: See `load_batch`.
        ConfigError: The batch was sampled at another temperature or from another vocabulary, or its groups cannot be
            shared evenly among the updates.
    """
    batch = load_batch(path, step=step)
    require(
        batch.temperature == config.rollout.temperature,
        field="rollout.temperature",
        value=config.rollout.temperature,
        rule=f"must be the {batch.temperature} that {path} was sampled at",
        way_out=f"set it to {batch.temperature}",
    )
    largest = int(batch.token_ids.max())
    require(
        largest < vocab_size,
        field="recorded_rollouts",
        value=config.recorded_rollouts,
        rule=f"must suit the model: token ids in {path} reach {largest}, its vocabulary has {vocab_size} tokens",
        way_out="train the model that the rollouts were recorded with",
    )
    return assign_updates(batch, config.algorithm)
