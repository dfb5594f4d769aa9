"""Groups and prompts in a file of plain arrays; what is no array is JSON, as bytes. Nothing is pickled."""

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fipo.rewards.literals import as_literal
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.files.array_files import ArrayFileError, read_arrays
from megatron_fipo.runtime.files.disk_errors import read_errors_told
from megatron_fipo.runtime.files.whole_file import whole_file
from megatron_fipo.types import Prompt, RolloutGroup, Sample

# What arrays can raise that are something else.
_UNFIT = (ValueError, TypeError, RuntimeError, LookupError, SyntaxError, StopIteration)


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """What a file holds.

    Attributes:
        told: Plain JSON values.
        groups: Groups, in order.
        prompts: Further prompts, in order.
    """

    told: Mapping[str, Any]
    groups: Sequence[RolloutGroup]
    prompts: Sequence[Prompt] = ()


def write_archive(archive: Archive, path: Path, format_version: int) -> None:
    """Write a file; when this returns, it is on disk, complete."""
    version = {"format_version": np.array(format_version, dtype=np.int64)}
    with whole_file(path) as file:
        np.savez(file, allow_pickle=False, **version, **_arrays(archive))


def read_archive[T](
    path: Path, format_version: int, what: str, error: type[RunError], build: Callable[[Archive], T]
) -> T:
    """Read a file.

    Args:
        path: The file.
        format_version: The one that is read.
        what: What it is called where it is unfit.
        error: Raised there.
        build: What becomes of its content.

    Raises:
        RunError: The file is missing, damaged, or of another format version; of the kind that is asked for.
        BreakdownError: The file system refuses.
    """
    try:
        with read_errors_told(path, error):
            arrays = read_arrays(path)
    except ArrayFileError as problem:
        raise error(f"{path}: cannot be read as {what} ({problem})") from problem
    version = arrays.get("format_version")
    if version is None or version.shape != () or version != format_version:
        raise error(f"{path}: format version {version}; this release reads {format_version}")
    try:
        return build(_archive(arrays))
    except _UNFIT as problem:
        raise error(f"{path}: is not {what} ({type(problem).__name__}: {problem})") from problem


def _arrays(archive: Archive) -> dict[str, npt.NDArray[Any]]:
    samples = [sample for group in archive.groups for sample in group.samples]
    versioned = [sample.policy_versions for sample in samples if sample.policy_versions is not None]
    content = {
        "told": dict(archive.told),
        "prompts": [_describe_prompt(prompt) for prompt in archive.prompts],
        "groups": [
            {"prompt": _describe_prompt(group.prompt), "samples": [_describe_sample(each) for each in group.samples]}
            for group in archive.groups
        ],
    }
    prompts = [*(group.prompt for group in archive.groups), *archive.prompts]
    arrays: dict[str, npt.NDArray[Any]] = {
        "content": np.frombuffer(json.dumps(content).encode("ascii"), dtype=np.uint8),
        "prompt_lengths": _lengths([prompt.token_ids for prompt in prompts]),
        "prompt_token_ids": _end_to_end([prompt.token_ids for prompt in prompts], np.int32),
        "response_lengths": _lengths([sample.response_token_ids for sample in samples]),
        "response_token_ids": _end_to_end([sample.response_token_ids for sample in samples], np.int32),
        "rollout_log_probs": _end_to_end([sample.rollout_log_probs for sample in samples], np.float32),
        "policy_version": np.array([sample.policy_version for sample in samples], dtype=np.int64),
        "is_versioned": np.array([sample.policy_versions is not None for sample in samples], dtype=bool),
        "policy_versions": _end_to_end(versioned, np.int32),
        "rewards": np.array([sample.reward for sample in samples], dtype=np.float64),
        "scores": np.array([sample.score for sample in samples], dtype=np.float64),
    }
    # By far the largest: not copied into one.
    experts = {_experts_name(place): sample.routed_experts for place, sample in enumerate(samples)}
    return arrays | {name: _narrow(each) for name, each in experts.items() if each is not None}


def _archive(arrays: Mapping[str, npt.NDArray[Any]]) -> Archive:
    content = json.loads(arrays["content"].tobytes())
    token_ids = _cut(arrays["prompt_token_ids"], arrays["prompt_lengths"])
    samples = _samples(arrays)
    groups = []
    for group in content["groups"]:
        prompt = _prompt(group["prompt"], next(token_ids))
        own = [_sample(prompt, described, next(samples)) for described in group["samples"]]
        groups.append(RolloutGroup(prompt=prompt, samples=own))
    prompts = [_prompt(described, next(token_ids)) for described in content["prompts"]]
    if next(token_ids, None) is not None or next(samples, None) is not None:
        raise ValueError("it has more arrays than groups")
    return Archive(told=content["told"], groups=groups, prompts=prompts)


def _describe_prompt(prompt: Prompt) -> dict[str, Any]:
    # A literal, since JSON would turn tuples into lists, and a task's scorer looks for what its generator made.
    metadata = repr(as_literal(dict(prompt.metadata)))
    return {
        "id": prompt.id,
        "text": prompt.text,
        "answer": prompt.answer,
        "source": prompt.source,
        "metadata": metadata,
    }


def _prompt(described: Mapping[str, Any], token_ids: npt.NDArray[Any]) -> Prompt:
    return Prompt(token_ids=token_ids, **(dict(described) | {"metadata": ast.literal_eval(described["metadata"])}))


def _describe_sample(sample: Sample) -> dict[str, Any]:
    return {
        "sample_index": sample.sample_index,
        "finish_reason": sample.finish_reason,
        "response_text": sample.response_text,
        "reward_terms": dict(sample.reward_terms),
        "answer": sample.answer,
    }


def _samples(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[dict[str, Any]]:
    """The arrays and numbers of each sample, by its fields."""
    lengths, is_versioned = arrays["response_lengths"], arrays["is_versioned"]
    responses = _cut(arrays["response_token_ids"], lengths)
    log_probs = _cut(arrays["rollout_log_probs"], lengths)
    versions = _cut(arrays["policy_versions"], lengths[is_versioned])
    for place in range(len(lengths)):
        experts = arrays.get(_experts_name(place))
        yield {
            "response_token_ids": next(responses),
            "rollout_log_probs": next(log_probs),
            "policy_version": int(arrays["policy_version"][place]),
            "policy_versions": next(versions) if is_versioned[place] else None,
            "routed_experts": None if experts is None else experts.astype(np.int16),
            "reward": float(arrays["rewards"][place]),
            "score": float(arrays["scores"][place]),
        }


def _sample(prompt: Prompt, described: Mapping[str, Any], values: Mapping[str, Any]) -> Sample:
    return Sample(prompt_id=prompt.id, **described, **values)


def _narrow(experts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers of experts, in one byte each where that is enough; -1 stands for one that nobody told."""
    is_enough = experts.size and experts.min() >= 0 and experts.max() <= np.iinfo(np.uint8).max
    return experts.astype(np.uint8) if is_enough else experts


def _experts_name(place: int) -> str:
    return f"routed_experts_{place:06d}"


def _lengths(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    return np.array([len(array) for array in arrays], dtype=np.int64)


def _end_to_end(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays], dtype=dtype)


def _cut(array: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
    if int(lengths.sum()) != len(array):
        raise ValueError(f"{len(array)} tokens where there should be {int(lengths.sum())}")
    ends = np.cumsum(lengths)
    return iter([array[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)])
