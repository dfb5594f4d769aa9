"""Whole runs, from configuration to export, and the ways in which they end early."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fipo.config.algorithm_card import effective_algorithm
from megatron_fipo.config.load import load_config
from megatron_fipo.config.run import RunConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.rollout.batch import load_batch
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.trainer.state import Run
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import (
    ANSWER_PATTERN,
    LIKELY_ANSWER,
    UPDATES,
    Ended,
    prompts,
    read_lines,
    run_in_turn,
    run_to_its_end,
    small_run,
    without_times,
    write_inputs,
)
from tests.tiny_models import EOS_TOKEN_ID, add_output_matrix, write_tiny_model

pytestmark = pytest.mark.distributed

STEPS = 2
LAYOUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("runs"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


# Runs at TP 2 × CP 2.


@pytest.fixture(scope="module")
def parallel_runs(root: Path) -> dict[str, RunConfig]:
    """Two equal runs, a recording of their first step, and training on that recording."""
    data = prompts(root, held_out="held_out")
    values = {"parallelism": LAYOUT, "num_steps": STEPS, "data": data}
    configs = {
        "first": small_run(root, "first", **values),
        "again": small_run(root, "again", **values),
        "recording": small_run(root, "recording", mode="rollout_only", parallelism=LAYOUT, data=data),
        "replayed": small_run(
            root,
            "replayed",
            mode="train_only",
            recorded_rollouts=root / "recording" / "rollouts",
            data=None,
            parallelism=LAYOUT,
        ),
    }
    for rank, ends in enumerate(run_distributed(run_in_turn, 4, list(configs.values()))):
        assert [ended.error for ended in ends] == [(), (), (), ()], f"rank {rank}"
    return configs


def test_a_repeated_run_is_bitwise_equal(parallel_runs: dict[str, RunConfig]) -> None:
    first, again = parallel_runs["first"].output_dir, parallel_runs["again"].output_dir
    mine, other = (without_times(read_lines(path / "metrics.jsonl")) for path in (first, again))
    assert len(mine) == STEPS + 1
    assert mine == other
    assert (first / "samples.jsonl").read_bytes() == (again / "samples.jsonl").read_bytes()
    exported = sorted(path.name for path in (first / "export").iterdir())
    assert "model.safetensors" in exported
    for name in exported:
        assert (first / "export" / name).read_bytes() == (again / "export" / name).read_bytes(), name


def test_training_on_the_recording_gives_the_same_updates(parallel_runs: dict[str, RunConfig]) -> None:
    together = read_lines(parallel_runs["first"].output_dir / "metrics.jsonl")[1]
    replayed = read_lines(parallel_runs["replayed"].output_dir / "metrics.jsonl")[1]
    keys = [key for key in together if key.startswith(("train/", "fipo/"))]
    assert {"train/loss_by_update", "train/grad_norm_by_update", "fipo/future_kl_mean"} <= set(keys)
    assert {key: replayed[key] for key in keys} == {key: together[key] for key in keys}


def test_a_recording_run_writes_batches_and_updates_nothing(parallel_runs: dict[str, RunConfig]) -> None:
    folder = parallel_runs["recording"].output_dir
    assert [path.name for path in (folder / "rollouts").iterdir()] == ["rollout_000001.npz"]
    batch = load_batch(folder / "rollouts" / "rollout_000001.npz")
    assert (batch.num_sequences, batch.num_mini_batches, batch.temperature) == (16, UPDATES, 1.0)
    assert not (folder / "export").exists()
    line = read_lines(folder / "metrics.jsonl")[1]
    assert line["rollout/reward_mean"] == batch.rewards.mean()
    assert not [key for key in line if key.startswith(("train/", "fipo/", "eval/"))]


def test_metrics_are_declared_and_finite(parallel_runs: dict[str, RunConfig]) -> None:
    lines = read_lines(parallel_runs["first"].output_dir / "metrics.jsonl")
    rooms = [{key.split("/")[0] for key in line} - {"step", "policy_version"} for line in lines]
    of_a_step = {"data", "rollout", "reward", "train", "fipo", "perf", "time"}
    assert rooms == [{"eval", "time"}, of_a_step, of_a_step | {"eval"}]
    for line in lines:
        assert not CATALOGUE.undeclared(line)
        for key, value in line.items():
            for number in value if isinstance(value, list) else [value]:
                assert isinstance(number, int | float) and math.isfinite(number), key
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["policy_version"] for line in lines[1:]] == [1, 2]


def test_metrics_say_what_happened(parallel_runs: dict[str, RunConfig]) -> None:
    for line in read_lines(parallel_runs["first"].output_dir / "metrics.jsonl")[1:]:
        assert line["rollout/num_sequences"] == 16
        assert 0 < line["rollout/reward_mean"] < 1
        assert line["rollout/groups_generated"] >= 4 + line["rollout/groups_without_signal"]
        assert (line["train/updates"], line["train/updates_skipped"]) == (UPDATES, 0)
        assert len(line["train/loss_by_update"]) == UPDATES
        assert line["train/loss"] == pytest.approx(sum(line["train/loss_by_update"]) / UPDATES)
        assert line["train/grad_norm"] > 0
        assert line["train/learning_rate"] == 1e-3
        assert line["fipo/null_future_kl_std"] == 0.0, "before the first update the policy is the old one"
        assert line["fipo/fraction_changed"] > 0, "after it, it is not"
        # A uniform distribution over 301 tokens has 5.7 nats.
        assert 5.0 < line["train/entropy"] < math.log(301)
        # Engine and actor are two implementations of one model.
        assert 0 < line["train/mismatch_mean_abs"] < 1e-5
    assert read_lines(parallel_runs["first"].output_dir / "metrics.jsonl")[0]["eval/num_problems"] == 8


def test_samples_are_written_with_their_rewards(parallel_runs: dict[str, RunConfig]) -> None:
    samples = read_lines(parallel_runs["first"].output_dir / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2]
    for sample in samples:
        found = re.findall(ANSWER_PATTERN, sample["response"])
        assert sample["reward"] == sample["group_rewards"][0] == float(found[-1:] == [LIKELY_ANSWER])
        assert set(sample["group_rewards"]) == {0.0, 1.0}, "dynamic sampling keeps groups that differ"
        number = int(sample["prompt_id"].removeprefix("train:")) - 1
        assert (sample["prompt"], sample["answer"]) == (f"{number}+{number}=", LIKELY_ANSWER)
        assert 1 <= sample["response_tokens"] <= 12
        assert sample["finish_reason"] == ("length" if sample["response_tokens"] == 12 else "stop")


def test_the_written_configuration_is_the_runs(parallel_runs: dict[str, RunConfig]) -> None:
    for config in parallel_runs.values():
        assert load_config(RunConfig, config.output_dir / "config.yaml") == config


def test_the_effective_algorithm_lies_beside_run_and_export(parallel_runs: dict[str, RunConfig]) -> None:
    config = parallel_runs["first"]
    card = effective_algorithm(config.algorithm) + "\n"
    for folder in (config.output_dir, config.output_dir / "export"):
        assert (folder / "effective_algorithm.txt").read_text(encoding="utf-8") == card


def test_the_export_is_a_trained_model(root: Path, parallel_runs: dict[str, RunConfig]) -> None:
    folder = parallel_runs["first"].output_dir / "export"
    before, after = weights(root / "model"), weights(folder)
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert max(moved.values()) < 0.01
    assert sum(change > 1e-5 for change in moved.values()) > len(moved) / 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("2+2=")["input_ids"]) == "2+2="
    assert tokenizer.eos_token_id == EOS_TOKEN_ID


# Runs that end early, on two data-parallel ranks.


class WrongBridge(HfBridge):
    """Exports one tensor too large by a hundredth."""

    def export(self, model: list[Any], dtype: torch.dtype | None = None) -> Any:
        for name, tensor in super().export(model, dtype):
            yield name, tensor * 1.01 if name == "model.norm.weight" else tensor


def use_wrong_bridge(run: Run) -> None:
    run.actor.bridge = WrongBridge(run.config.model.path)


class UnknownBridge(HfBridge):
    """Describes what it exports as a model that nobody knows."""

    def export_config(self, dtype: torch.dtype) -> dict[str, Any]:
        return super().export_config(dtype) | {"model_type": "unknown"}


def use_unknown_bridge(run: Run) -> None:
    run.actor.bridge = UnknownBridge(run.config.model.path)


def end_early(configs: list[RunConfig]) -> list[Ended]:
    quiet_upstream()
    return [
        run_to_its_end(
            config, {"wrong_export": use_wrong_bridge, "unknown_export": use_unknown_bridge}.get(config.output_dir.name)
        )
        for config in configs
    ]


def poison(root: Path, recording: Path) -> tuple[Path, int]:
    """A model that is not finite on the token of one recorded sequence of the first update; and that sequence."""
    batch = load_batch(recording)
    starts = batch.sequence_starts
    sequences = [batch.token_ids[starts[place] : starts[place + 1]].tolist() for place in range(batch.num_sequences)]
    token, place = next(
        (token, place)
        for place in range(batch.num_sequences - 1, -1, -1)
        if batch.mini_batch_ids[place] == 0
        for token in sequences[place][:-1]
        if sum(token in other for other in sequences) == 1
    )
    folder = write_tiny_model(root / "poisoned", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.embed_tokens.weight.data[token] = math.nan
    model.save_pretrained(folder)
    return folder, place


def broken_model(root: Path) -> Path:
    folder = write_tiny_model(root / "broken")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.norm.weight.data[7] = math.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def early_ends(root: Path, parallel_runs: dict[str, RunConfig]) -> dict[str, Any]:
    """How each configuration ended, the same on both ranks; and the poisoned sequence."""
    recorded = parallel_runs["recording"].output_dir / "rollouts"
    damaged, unreadable = root / "damaged", root / "unreadable"
    whole = (recorded / "rollout_000001.npz").read_bytes()
    for folder in (damaged, unreadable):
        folder.mkdir()
        (folder / "rollout_000001.npz").write_bytes(whole if folder == damaged else whole[:500])
    (damaged / "rollout_000002.npz").write_bytes(whole[:-100])
    poisoned, place = poison(root, recorded / "rollout_000001.npz")
    tied_to_another = add_output_matrix(write_tiny_model(root / "tied_to_another"), 2.0)
    replay = {"mode": "train_only", "recorded_rollouts": recorded, "data": None}
    hopeless = prompts(root, train="hopeless")
    configs = [
        small_run(root, "no_signal", data=hopeless),
        small_run(
            root,
            "out_of_prompts",
            data=replace(prompts(root, held_out="held_out"), epochs=1),
            num_steps=5,
            rollout={"over_sampling": 2.0},
        ),
        small_run(root, "not_finite", **replay, model={"path": poisoned}),
        small_run(root, "not_finite_rollout", model={"path": broken_model(root)}),
        small_run(root, "damaged_later", **replay | {"recorded_rollouts": damaged}, num_steps=2),
        small_run(root, "damaged_at_once", **replay | {"recorded_rollouts": unreadable}),
        small_run(root, "wrong_export", **replay),
        small_run(root, "unknown_export", **replay),
        small_run(root, "too_many_steps", **replay, num_steps=2),
        small_run(root, "no_recording", **replay | {"recorded_rollouts": root / "model"}),
        small_run(root, "other_temperature", **replay, rollout={"temperature": 0.5}),
        small_run(
            root, "too_long", rollout={"max_response_tokens": 250}, parallelism={"max_tokens_per_micro_batch": 512}
        ),
        small_run(root, "too_few_held_out", data=prompts(root, held_out="held_out"), evaluation={"num_prompts": 9}),
        small_run(root, "no_prompts", data=prompts(root, train="absent")),
        replace(
            parallel_runs["first"],
            parallelism=small_run(root, "x").parallelism,
            checkpoint=replace(parallel_runs["first"].checkpoint, resume=False),
        ),
        small_run(root, "no_model", model={"path": root / "absent"}),
        small_run(root, "output_matrix", model={"path": tied_to_another}),
    ]
    ranks = run_distributed(end_early, 2, configs)
    assert [ended.error for ended in ranks[0]] == [ended.error for ended in ranks[1]], "every rank says the same"
    return {config.output_dir.name: ended for config, ended in zip(configs, ranks[0], strict=True)} | {"place": place}


def test_no_signal_ends_the_run_on_every_rank(root: Path, early_ends: dict[str, Any]) -> None:
    kind, text = early_ends["no_signal"].error
    assert kind == "NoSignalError"
    assert text.startswith("step 1: rollout.max_generation_rounds = 3: none of 12 groups had differing rewards (mean ")
    assert not (root / "no_signal" / "export").exists()


def test_a_run_without_further_prompts_keeps_what_it_has_learnt(root: Path, early_ends: dict[str, Any]) -> None:
    assert early_ends["out_of_prompts"].error == ()
    (said,) = (text for text in early_ends["out_of_prompts"].log if "data.epochs" in text)
    lines = read_lines(root / "out_of_prompts" / "metrics.jsonl")
    assert said.startswith(f"step {len(lines) - 1}: data.epochs = 1: ")
    assert said.endswith("; the run ends here")
    assert 2 <= len(lines) - 1 < 5
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert lines[-1]["policy_version"] == len(lines) - 2
    assert "eval/accuracy" in lines[-1]
    assert "train/loss" not in lines[-1]
    assert (root / "out_of_prompts" / "export" / "config.json").exists()


def test_weights_that_are_not_finite_end_the_run_with_the_place(root: Path, early_ends: dict[str, Any]) -> None:
    kind, text = early_ends["not_finite"].error
    assert kind == "NonFiniteError"
    found = re.fullmatch(
        r"step 1, update 1 of 2: the loss is nan, first in micro-batch 0 of rank [01] \(sequences \[([\d, ]+)\] of the "
        r"rollout batch\), token \d+ of the response of sequence \d+: log_probs is nan, old_log_probs is nan\. "
        r"The weights were not finite before it: embedding\.word_embeddings\.weight \(rank 0, 1\); the update was not "
        r"applied; it is kept in \S+/not_finite/dumps/step_1",
        text,
    )
    assert found, text
    assert early_ends["place"] in [int(number) for number in found[1].split(",")]
    assert not (root / "not_finite" / "export").exists()


def test_a_model_that_is_not_finite_cannot_generate(root: Path, early_ends: dict[str, Any]) -> None:
    kind, text = early_ends["not_finite_rollout"].error
    assert kind == "NonFiniteError"
    assert re.fullmatch(
        r"prompt train:\d+, sample 0: the log-probability of response token 0 is nan; the engine's weights of policy "
        r"version 0 are broken: check the model's files, or lower optimizer\.learning_rate",
        text,
    )
    assert not (root / "not_finite_rollout" / "export").exists()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "damaged_later",
            ("RecordedBatchError", "{root}/damaged/rollout_000002.npz: cannot be read as a recorded rollout batch"),
        ),
        (
            "damaged_at_once",
            ("RecordedBatchError", "{root}/unreadable/rollout_000001.npz: cannot be read as a recorded rollout batch"),
        ),
        (
            "too_many_steps",
            (
                "ConfigError",
                "num_steps = 2: must not exceed the recorded rollouts: {root}/recording/rollouts/rollout_000002.npz "
                "for step 2 does not exist; lower num_steps, or record more with mode rollout_only",
            ),
        ),
        (
            "no_recording",
            (
                "ConfigError",
                "recorded_rollouts = {root}/model: must hold recorded rollouts, and there is no rollout_000001.npz in "
                "it; name the rollouts/ folder of a rollout_only run",
            ),
        ),
        (
            "other_temperature",
            (
                "ConfigError",
                "rollout.temperature = 0.5: must be the 1.0 that {root}/recording/rollouts/rollout_000001.npz was "
                "sampled at; set it to 1.0",
            ),
        ),
        (
            "too_long",
            (
                "ConfigError",
                "rollout.max_response_tokens = 250: must not exceed, with data.max_prompt_tokens = 16, the model's 256 "
                "positions; shorten prompts or responses, or set model.context_length to 266 or more",
            ),
        ),
        (
            "too_few_held_out",
            (
                "ConfigError",
                "evaluation.num_prompts = 9: must not exceed the 8 usable prompts of data.evaluation; lower it or give "
                "more prompts",
            ),
        ),
        ("no_prompts", ("ConfigError", "data.train.path = {root}/absent.jsonl: must be a readable file")),
        (
            "first",
            (
                "ConfigError",
                "output_dir = {root}/first: must be a new or empty directory, and it is not; choose another directory "
                "or remove this one",
            ),
        ),
        (
            "no_model",
            ("ConfigError", "model.path = {root}/absent: must be a Hugging Face model folder, and there is no such"),
        ),
        (
            "output_matrix",
            ("ConfigError", "model.path = {root}/tied_to_another: has lm_head.weight with other bytes, though config"),
        ),
    ],
)
def test_bad_input_ends_the_run_on_every_rank(
    name: str, error: tuple[str, str], root: Path, early_ends: dict[str, Any]
) -> None:
    kind, text = early_ends[name].error
    assert kind == error[0]
    assert text.startswith(error[1].format(root=root))
    # Only what is met in the middle of a run leaves a run directory.
    assert (root / name).exists() == (name in ("first", "damaged_later"))


def test_an_export_that_differs_from_the_actor_is_not_put_in_place(root: Path, early_ends: dict[str, Any]) -> None:
    kind, text = early_ends["wrong_export"].error
    assert kind == "ExportError"
    assert text.startswith(f"{root}/wrong_export/export: its logits differ from the actor's (float32: largest")
    assert not [path for path in (root / "wrong_export").iterdir() if "export" in path.name]


def test_an_export_that_is_no_model_ends_the_run_on_every_rank(root: Path, early_ends: dict[str, Any]) -> None:
    kind, text = early_ends["unknown_export"].error
    assert kind == "ExportError"
    assert "describes no model that transformers knows ('unknown': " in text
    assert not [path for path in (root / "unknown_export").iterdir() if "export" in path.name]


# Runs on one rank.


@pytest.fixture(scope="module")
def single_runs(root: Path) -> dict[str, Ended]:
    no_drop = {"drop_zero_variance_groups": False}
    configs = [
        small_run(root, "equal_rewards", data=prompts(root, train="hopeless"), algorithm=no_drop, num_steps=2),
        small_run(
            root,
            "bfloat16",
            model={"dtype": "bfloat16"},
            checkpoint={"export_dtype": "bfloat16"},
            data=prompts(root, held_out="train"),
        ),
        # As small a token budget as the run's own sequences allow, far below the export's probe.
        small_run(root, "small_budget", parallelism={"max_tokens_per_micro_batch": 32}),
    ]
    (ends,) = run_distributed(run_in_turn, 1, configs)
    return {config.output_dir.name: ended for config, ended in zip(configs, ends, strict=True)}


def test_equal_rewards_everywhere_change_nothing_and_are_said(root: Path, single_runs: dict[str, Ended]) -> None:
    ended = single_runs["equal_rewards"]
    assert ended.error == ()
    assert ended.log == [f"step {step}: every group has equal rewards; all its updates were skipped" for step in (1, 2)]
    for line in read_lines(root / "equal_rewards" / "metrics.jsonl")[1:]:
        assert (line["train/updates"], line["train/updates_skipped"]) == (UPDATES, UPDATES)
        assert (line["rollout/reward_mean"], line["rollout/advantage_abs_mean"], line["policy_version"]) == (0, 0, 0)
        assert "train/loss" not in line
    before, after = weights(root / "model"), weights(root / "equal_rewards" / "export")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_token_budget_below_the_probe_does_not_lose_the_export(root: Path, single_runs: dict[str, Ended]) -> None:
    assert single_runs["small_budget"].error == ()
    assert (root / "small_budget" / "export" / "model.safetensors").is_file()


def test_a_bfloat16_run_exports_what_it_trained(root: Path, single_runs: dict[str, Ended]) -> None:
    ended = single_runs["bfloat16"]
    assert ended.error == ()
    (shared,) = ended.log
    assert shared.endswith("/train.jsonl: 8 of 8 evaluation prompts also occur among the training prompts")
    line = read_lines(root / "bfloat16" / "metrics.jsonl")[1]
    assert line["fipo/null_future_kl_std"] == 0.0
    assert line["train/grad_norm"] > 0
    assert 0 < line["train/mismatch_mean_abs"] < 0.05
    exported = weights(root / "bfloat16" / "export")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    rounded = {name: tensor.bfloat16() for name, tensor in weights(root / "model").items()}
    assert sum(not torch.equal(exported[name], rounded[name]) for name in rounded) > len(rounded) / 2
