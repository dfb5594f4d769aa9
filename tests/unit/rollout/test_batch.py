import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.baselines import DapoConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.data.routing_file import RoutingFile
from megatron_fipo.rollout.batch import (
    RecordedBatchError,
    assign_updates,
    batch_path,
    build_train_batch,
    load_batch,
    load_recorded,
    routing_path,
    save_batch,
    with_routing,
)
from megatron_fipo.types import Prompt, RolloutGroup, Sample, TrainBatch

DAPO = DapoConfig(updates_per_rollout=2, normalize_advantages_by_std=False)
ARRAYS = [field.name for field in dataclasses.fields(TrainBatch) if field.name not in ("temperature", "routing_file")]


def group(number: int, prompt: list[int], *samples: tuple[list[int], float]) -> RolloutGroup:
    """A group whose samples are (response, reward); log-probabilities tell sample and place."""
    name = f"p{number}"
    return RolloutGroup(
        prompt=Prompt(id=name, token_ids=np.array(prompt, dtype=np.int32), text=""),
        samples=[
            Sample(
                prompt_id=name,
                sample_index=index,
                response_token_ids=np.array(response, dtype=np.int32),
                rollout_log_probs=-np.arange(1, len(response) + 1, dtype=np.float32) / (index + 1),
                finish_reason="stop",
                policy_version=10 + number,
                reward=reward,
            )
            for index, (response, reward) in enumerate(samples)
        ],
    )


@pytest.fixture
def batch() -> TrainBatch:
    return build_train_batch(
        [group(0, [5, 6], ([7], 1.0), ([8, 9], 0.0)), group(1, [3], ([4, 2, 1], 0.25), ([2], 0.75))],
        DAPO,
        temperature=0.7,
    )


def assert_equal(left: TrainBatch, right: TrainBatch) -> None:
    for name in ARRAYS:
        mine, other = getattr(left, name), getattr(right, name)
        assert mine.dtype == other.dtype, name
        np.testing.assert_array_equal(mine, other, err_msg=name)
    assert left.temperature == right.temperature


def test_samples_are_laid_end_to_end(batch: TrainBatch) -> None:
    expected = {
        "token_ids": np.array([5, 6, 7, 5, 6, 8, 9, 3, 4, 2, 1, 3, 2], dtype=np.int32),
        "sequence_lengths": np.array([3, 4, 4, 2], dtype=np.int32),
        "prompt_lengths": np.array([2, 2, 1, 1], dtype=np.int32),
        "response_mask": np.array([0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=bool),
        "rollout_log_probs": np.array([0, 0, -1, 0, 0, -0.5, -1, 0, -1, -2, -3, 0, -0.5], dtype=np.float32),
        "rewards": np.array([1, 0, 0.25, 0.75], dtype=np.float32),
        "advantages": np.array([0.5, -0.5, -0.25, 0.25], dtype=np.float32),
        "group_ids": np.array([0, 0, 1, 1], dtype=np.int32),
        "mini_batch_ids": np.array([0, 0, 1, 1], dtype=np.int32),
        "policy_versions": np.array([-1, -1, 10, -1, -1, 10, 10, -1, 11, 11, 11, -1, 11], dtype=np.int32),
    }
    assert_equal(batch, TrainBatch(**expected, temperature=0.7))
    assert batch.num_mini_batches == 2
    assert batch.sequence_starts.tolist() == [0, 3, 7, 11, 13]


def test_every_token_keeps_the_version_that_gave_it() -> None:
    groups = [group(4, [1, 2], ([5, 6, 7], 1.0), ([8], 0.0))]
    groups[0].samples[0].policy_versions = np.array([14, 15, 15], dtype=np.int32)
    batch = build_train_batch(groups, DapoConfig(updates_per_rollout=1), temperature=1.0)
    assert batch.policy_versions.tolist() == [-1, -1, 14, 15, 15, -1, -1, 14]


@pytest.mark.parametrize(
    ("updates", "mini_batches"),
    [(1, [0, 0, 0, 0, 0, 0]), (2, [0, 0, 0, 1, 1, 1]), (3, [0, 0, 1, 1, 2, 2]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_updates_take_whole_groups_in_order(updates: int, mini_batches: list[int]) -> None:
    groups = [group(number, [1], ([2], 1.0), ([3], 0.0)) for number in range(6)]
    batch = build_train_batch(groups, DapoConfig(updates_per_rollout=updates), 1.0)
    assert batch.mini_batch_ids.tolist() == np.repeat(mini_batches, 2).tolist()


def test_a_batch_can_be_cut_anew_for_another_algorithm(batch: TrainBatch) -> None:
    again = assign_updates(batch, DapoConfig(updates_per_rollout=1, advantage_epsilon=0.0))
    assert again.mini_batch_ids.tolist() == [0, 0, 0, 0]
    # Two samples lie one half of their unbiased standard deviation times the root of 2 from their mean.
    np.testing.assert_allclose(again.advantages, np.array([1, -1, -1, 1]) / np.sqrt(2), rtol=1e-6)
    assert_equal(assign_updates(again, DAPO), batch)


def test_groups_that_updates_cannot_share_are_refused() -> None:
    groups = [group(number, [1], ([2], 1.0), ([3], 0.0)) for number in range(6)]
    with pytest.raises(ConfigError) as caught:
        build_train_batch(groups, DapoConfig(updates_per_rollout=4), 1.0)
    assert str(caught.value) == (
        "algorithm.updates_per_rollout = 4: must divide the 6 groups of the rollout batch; choose a divisor of 6"
    )


def test_a_recorded_batch_comes_back_as_it_was(batch: TrainBatch, tmp_path: Path) -> None:
    path = batch_path(tmp_path / "rollouts", 12)
    save_batch(batch, path)
    assert [each.name for each in path.parent.iterdir()] == ["rollout_000012.npz"]
    assert_equal(load_batch(path), batch)
    assert load_batch(path).routing_file is None


def test_experts_of_the_samples_come_back_in_the_order_of_the_batch(tmp_path: Path) -> None:
    groups = [group(0, [5, 6], ([7], 1.0), ([8, 9], 0.0)), group(1, [3], ([4, 2, 1], 0.25), ([2], 0.75))]
    for number, sample in enumerate(each for part in groups for each in part.samples):
        length = len(sample.response_token_ids) + (2 if number < 2 else 1)
        sample.routed_experts = np.full((length - 1, 3, 2), number, dtype=np.int16)
    path = batch_path(tmp_path / "rollouts", 1)
    batch = with_routing(build_train_batch(groups, DAPO, temperature=0.7), groups, routing_path(path))
    save_batch(batch, path)
    loaded = load_batch(path)
    assert loaded.routing_file == batch.routing_file == path.with_suffix(".routing")
    experts, recorded = RoutingFile(loaded.routing_file).read([1], np.arange(len(batch.token_ids)))
    # Lengths 3, 4, 4 and 2; nothing is known of a last token.
    assert experts[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 0, 3, 0]
    assert recorded.tolist() == [*[True] * 2, False, *[True] * 3, False, *[True] * 3, False, True, False]


def changed(**values: Any) -> Any:
    """Change arrays of a recording; None leaves one out."""

    def change(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in (arrays | values).items() if value is not None}

    return change


def at(name: str, place: int, value: Any) -> Any:
    def change(arrays: dict[str, Any]) -> dict[str, Any]:
        array = arrays[name].copy()
        array[place] = value
        return arrays | {name: array}

    return change


def empty(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array[:0] if array.ndim else array for name, array in arrays.items()}


def shorter(name: str) -> Any:
    return lambda arrays: arrays | {name: arrays[name][:-1]}


def cast(name: str, dtype: Any) -> Any:
    return lambda arrays: arrays | {name: arrays[name].astype(dtype)}


BROKEN = {
    "no version": (changed(format_version=None), "format version nan; this release reads 2: record the rollouts anew"),
    "another version": (
        changed(format_version=np.int64(1)),
        "format version 1; this release reads 2: record the rollouts anew",
    ),
    "a version of several numbers": (changed(format_version=np.array([1, 1])), "format version nan"),
    "arrays left out": (changed(rewards=None, token_ids=None), "lacks token_ids, rewards"),
    "no temperature": (changed(temperature=None), "temperature is not a positive number"),
    "a temperature of text": (changed(temperature=np.array("1.0")), "temperature is not a positive number"),
    "a temperature of 0": (changed(temperature=np.float64(0)), "temperature is not a positive number"),
    "fractional tokens": (cast("token_ids", np.float32), "token_ids are not one-dimensional arrays of the right type"),
    "wide numbers": (cast("group_ids", np.int64), "group_ids are not one-dimensional arrays of the right type"),
    "a table of tokens": (
        lambda arrays: arrays | {"token_ids": arrays["token_ids"][None]},
        "token_ids are not one-dimensional arrays of the right type",
    ),
    "a token short": (shorter("token_ids"), "token_ids do not fit 4 sequences of 13 tokens"),
    "a mask short": (shorter("response_mask"), "response_mask do not fit 4 sequences of 13 tokens"),
    "a reward short": (shorter("rewards"), "rewards do not fit 4 sequences of 13 tokens"),
    "a length changed": (
        at("sequence_lengths", 1, 5),
        "token_ids, response_mask, rollout_log_probs, policy_versions do not fit 4 sequences of 14 tokens",
    ),
    "no sequence": (empty, "holds no sequence"),
    "a negative length": (
        lambda arrays: at("sequence_lengths", 0, -3)(at("sequence_lengths", 1, 10)(arrays)),
        "a prompt is empty, or longer than its sequence",
    ),
    "a prompt too long": (at("prompt_lengths", 3, 3), "a prompt is empty, or longer than its sequence"),
    "an empty prompt": (at("prompt_lengths", 2, 0), "a prompt is empty, or longer than its sequence"),
    "a prompt's token in the mask": (at("response_mask", 4, True), "response_mask holds tokens of a prompt"),
    "a negative token": (at("token_ids", 0, -1), "token_ids are negative"),
    "a version on a prompt": (
        at("policy_versions", 0, 10),
        "policy_versions are not −1 on prompts and 0 or more on responses",
    ),
    "a response without a version": (
        at("policy_versions", 2, -1),
        "policy_versions are not −1 on prompts and 0 or more on responses",
    ),
    "a reward that is no number": (at("rewards", 2, np.nan), "rewards are not finite"),
    "an infinite log-probability": (at("rollout_log_probs", 2, -np.inf), "rollout_log_probs are not finite"),
    "a group missing": (at("group_ids", slice(2, 4), 2), "group_ids do not count up from 0"),
    "groups from 1": (at("group_ids", slice(None), 1), "group_ids do not count up from 0"),
    "groups in disorder": (at("group_ids", slice(None), [0, 1, 0, 1]), "group_ids do not count up from 0"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_recording_whose_arrays_disagree_is_refused(kind: str, batch: TrainBatch, tmp_path: Path) -> None:
    change, text = BROKEN[kind]
    path = tmp_path / "rollout.npz"
    save_batch(batch, path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **change(arrays))
    with pytest.raises(RecordedBatchError) as caught:
        load_batch(path)
    assert str(caught.value).startswith(f"{path}: {text}")


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def pickled_array(trace: Path) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = Trap(trace)
    return array


def test_nothing_is_unpickled(batch: TrainBatch, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "rollout.npz"
    arrays = {name: getattr(batch, name) for name in ARRAYS}
    values = {"format_version": np.int64(1), "temperature": np.float64(1), **arrays, "rewards": pickled_array(trace)}
    np.savez(path, allow_pickle=True, **values)
    with pytest.raises(RecordedBatchError, match="cannot be read"):
        load_batch(path)
    lone = tmp_path / "lone.npz"
    with lone.open("wb") as file:
        np.save(file, pickled_array(trace), allow_pickle=True)
    with pytest.raises(RecordedBatchError, match="cannot be read"):
        load_batch(lone)
    assert not trace.exists()
    np.load(lone, allow_pickle=True)
    assert trace.exists(), "the trap works"


def write_bytes(content: bytes) -> Any:
    return lambda path, whole: path.write_bytes(content)


def lone_array(path: Path, whole: bytes) -> None:
    with path.open("wb") as file:
        np.save(file, np.arange(3))


def encrypted(path: Path, whole: bytes) -> None:
    """Set the mark of an encrypted member in the first local header and in the directory."""
    content = bytearray(whole)
    content[6] |= 1
    content[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def no_arrays(path: Path, whole: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing here")


DAMAGED = {
    "absent": lambda path, whole: path.unlink(),
    "a folder": lambda path, whole: (path.unlink(), path.mkdir()),
    "empty": write_bytes(b""),
    "text": write_bytes(b"not a recording"),
    "a cut-off archive": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "an archive's first bytes alone": lambda path, whole: path.write_bytes(whole[:4]),
    "a changed byte": lambda path, whole: path.write_bytes(
        whole[: whole.index(b"\x05\x00\x00\x00\x06")] + b"\x07" + whole[whole.index(b"\x05\x00\x00\x00\x06") + 1 :]
    ),
    "encrypted": encrypted,
    "a lone array": lone_array,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused(kind: str, batch: TrainBatch, tmp_path: Path) -> None:
    path = tmp_path / "rollout.npz"
    save_batch(batch, path)
    DAMAGED[kind](path, path.read_bytes())
    with pytest.raises(RecordedBatchError) as caught:
        load_batch(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as a recorded rollout batch (")


def test_an_archive_without_arrays_is_refused(batch: TrainBatch, tmp_path: Path) -> None:
    no_arrays(tmp_path / "rollout.npz", b"")
    with pytest.raises(RecordedBatchError, match="format version nan"):
        load_batch(tmp_path / "rollout.npz")


def test_an_interrupted_recording_leaves_no_file(batch: TrainBatch, tmp_path: Path) -> None:
    path = batch_path(tmp_path, 1)
    unwritable = dataclasses.replace(batch, rewards=Unwritable())
    with pytest.raises(RuntimeError, match="the disk went away"):
        save_batch(unwritable, path)
    assert not path.exists()


class Unwritable:
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the disk went away")


def run_config(folder: Path, algorithm: AlgorithmConfig = DAPO, temperature: float = 0.7) -> RunConfig:
    return RunConfig(
        output_dir=folder / "out",
        num_steps=1,
        mode="train_only",
        recorded_rollouts=folder,
        model=ModelConfig(path=folder / "model"),
        algorithm=algorithm,
        rollout=RolloutConfig(temperature=temperature),
    )


def test_a_recording_is_cut_for_the_run_that_reads_it(batch: TrainBatch, tmp_path: Path) -> None:
    path = batch_path(tmp_path, 1)
    save_batch(batch, path)
    assert_equal(load_recorded(path, run_config(tmp_path), vocab_size=10), batch)
    assert_equal(load_batch(path, step=3), batch)
    save_batch(batch, path, step=2)
    assert_equal(load_recorded(path, run_config(tmp_path), vocab_size=10, step=2), batch)
    with pytest.raises(RecordedBatchError, match=r"was recorded for step 2 and is in the place of step 3; bring back"):
        load_recorded(path, run_config(tmp_path), vocab_size=10, step=3)


@pytest.mark.parametrize(
    ("changes", "vocab_size", "text"),
    [
        (
            {"temperature": 1.0},
            10,
            "rollout.temperature = 1.0: must be the 0.7 that {path} was sampled at; set it to 0.7",
        ),
        (
            {},
            9,
            "recorded_rollouts = {folder}: must suit the model: token ids in {path} reach 9, its vocabulary has 9 "
            "tokens; train the model that the rollouts were recorded with",
        ),
        (
            {"algorithm": DapoConfig(updates_per_rollout=4)},
            10,
            "algorithm.updates_per_rollout = 4: must divide the 2 groups of the rollout batch; choose a divisor of 2",
        ),
    ],
)
def test_a_recording_that_does_not_suit_the_run_is_refused(
    changes: dict[str, Any], vocab_size: int, text: str, batch: TrainBatch, tmp_path: Path
) -> None:
    path = batch_path(tmp_path, 1)
    save_batch(batch, path)
    with pytest.raises(ConfigError) as caught:
        load_recorded(path, run_config(tmp_path, **changes), vocab_size)
    assert str(caught.value) == text.format(path=path, folder=tmp_path)
