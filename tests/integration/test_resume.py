"""Runs that go on after an end: the same steps as without one, in the same files."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.run import RunConfig
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.runtime.stop_request import StopRequest, StopRequested
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import (
    Ended,
    prompts,
    read_lines,
    run_to_its_end,
    small_run,
    without_times,
    write_inputs,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 4
# Process grids of two ranks, in an order that has eight different changes from one to another.
GRIDS: tuple[dict[str, Any], ...] = (
    {},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"context_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"use_distributed_optimizer": True},
    {"context_parallel_size": 2},
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("resume"))


def config(root: Path, name: str, num_steps: int = STEPS, **changes: Any) -> RunConfig:
    values = {
        "rollout": {"over_sampling": 1.5, "carry_over_max_lag": 1, "max_response_tokens": 6},
        "checkpoint": {"every_steps": 2, "export_dtype": "float32", "verify_export": False},
        "evaluation": {"num_prompts": 4, "every_steps": 1},
        "data": prompts(root, held_out="held_out"),
    }
    return small_run(root, name, num_steps=num_steps, **(values | changes))


def run_in_turn(configs: list[RunConfig]) -> list[Ended]:
    quiet_upstream()
    return [run_to_its_end(each) for each in configs]


def ends_of(configs: list[RunConfig]) -> list[Ended]:
    """Run them, one after the other on two ranks, which end alike; how they ended on rank 0."""
    first, second = run_distributed(run_in_turn, 2, configs)
    assert [each.error for each in first] == [each.error for each in second]
    return list(first)


def lines(config: RunConfig) -> list[dict[str, Any]]:
    return without_times(read_lines(config.output_dir / "metrics.jsonl"))


def test_a_run_that_goes_on_repeats_the_uninterrupted_one_bit_by_bit(root: Path) -> None:
    # The files may move, or have other names, as long as the source keeps its own.
    for name in ("train", "held_out"):
        shutil.copy(root / f"{name}.jsonl", root / f"{name}_moved.jsonl")
    moved = prompts(root, "train_moved", "held_out_moved", name="train")
    moved = replace(moved, evaluation=replace(moved.evaluation, name="held_out"))
    whole, *parts = configs = [
        config(root, "whole"),
        *(config(root, "parts", steps) for steps in (1, 3)),
        config(root, "parts", STEPS, data=moved),
    ]
    ends = ends_of([*configs, parts[-1]])
    assert [each.error for each in ends] == [()] * 5
    assert [line["step"] for line in lines(parts[-1])] == list(range(STEPS + 1))
    assert lines(parts[-1]) == lines(whole)
    one, other = whole.output_dir, parts[-1].output_dir
    for name in ("samples.jsonl", "export/model.safetensors", "evaluations/step_4/problems.jsonl"):
        assert (other / name).read_bytes() == (one / name).read_bytes()
    # What the shorter runs had exported is kept.
    assert sorted(path.name for path in other.glob("export*")) == ["export", "export_step_1", "export_step_3"]


def test_a_run_goes_on_in_other_process_grids(root: Path) -> None:
    """On recorded rollouts, so that rounding cannot change what is trained on."""
    steps = len(GRIDS)
    recording = config(root, "recording", steps, mode="rollout_only")
    replay = {"mode": "train_only", "recorded_rollouts": recording.output_dir / "rollouts", "data": None}
    whole = config(root, "one_grid", steps, **replay)
    parts = [
        config(root, "grids", step, **replay, parallelism={"max_tokens_per_micro_batch": 64} | grid)
        for step, grid in enumerate(GRIDS, start=1)
    ]
    ends = ends_of([recording, whole, *parts])
    assert [each.error for each in ends] == [()] * (2 + steps)
    one, other = lines(whole), lines(parts[-1])
    assert [line["step"] for line in other] == list(range(steps + 1))
    for mine, its in zip(other, one, strict=True):
        assert mine.keys() == its.keys()
        for key in ("train/loss", "train/grad_norm"):
            if key in its:
                assert mine[key] == pytest.approx(its[key], rel=2e-6, abs=1e-7), (mine["step"], key)


def test_a_recording_goes_on_too(root: Path) -> None:
    recording = {"mode": "rollout_only", "checkpoint": {"every_steps": 1}}
    whole, *parts = (
        config(root, name, steps, **recording) for name, steps in (("taped", 3), ("spliced", 1), ("spliced", 3))
    )
    assert [each.error for each in ends_of([whole, *parts])] == [()] * 3
    one, other = (
        {path.name: path.read_bytes() for path in (each.output_dir / "rollouts").iterdir()}
        for each in (whole, parts[-1])
    )
    assert len(one) == 3 and other == one
    assert lines(parts[-1]) == lines(whole)
    recorded = whole.output_dir / "rollouts"
    shutil.copy(recorded / "rollout_000002.npz", recorded / "rollout_000003.npz")
    twice = config(root, "twice", 3, mode="train_only", recorded_rollouts=recorded, data=None)
    ((ended,),) = run_distributed(run_in_turn, 1, [twice])
    assert ended.error[0] == "RecordedBatchError" and "was recorded for step 2 and is in the place of" in ended.error[1]


def test_changes_of_the_configuration_are_told_and_refused_or_accepted(root: Path) -> None:
    begun = config(root, "changed", 2)
    refused = {
        "seed": config(root, "changed", 3, seed=2),
        "learning rate": config(root, "changed", 3, optimizer={"learning_rate": 2e-3}),
        "prompts": config(root, "changed", 3, data=prompts(root, "hopeless", "held_out")),
        "resume": config(root, "changed", 3, checkpoint={"resume": False}),
        "misspelt": config(root, "changed", 3, checkpoint={"accept_changes": ("optimiser",)}),
    }
    accepted = config(
        root,
        "changed",
        3,
        optimizer={"learning_rate": 2e-3},
        checkpoint={"accept_changes": ("optimizer",), "every_steps": 2, "export_at_end": False},
    )
    other_prompts = config(
        root,
        "changed",
        4,
        data=prompts(root, "hopeless", "held_out", name="train"),
        optimizer={"learning_rate": 2e-3},
    )
    first, *ends, went_on, fingerprint = ends_of([begun, *refused.values(), accepted, other_prompts])
    assert first.error == went_on.error == ()
    errors = dict(zip(refused, (each.error for each in ends), strict=True))
    assert errors["seed"][1].startswith("seed = 2: must stay 1, as the run in output_dir has it; restore it, or")
    assert '--checkpoint.accept_changes "[optimizer.learning_rate]"' in errors["learning rate"][1]
    assert errors["prompts"][1].startswith("data.train.name = hopeless: must stay train, as the run in output_dir")
    assert "must be a new or empty directory" in errors["resume"][1]
    assert errors["misspelt"][1].startswith("checkpoint.accept_changes = optimiser: must name fields or sections")
    assert "not as in the run's configuration: optimizer.learning_rate: 0.001 → 0.002" in went_on.log
    assert [line["step"] for line in lines(accepted)] == [0, 1, 2, 3]
    assert lines(accepted)[-1]["train/learning_rate"] == 2e-3
    kind, text = fingerprint.error
    assert text.startswith("data.train = ") and "a resumed run keeps its prompts" in text
    assert [line["step"] for line in lines(accepted)] == [0, 1, 2, 3], "a refused run leaves everything as it was"
    assert "hopeless" not in (begun.output_dir / "config.yaml").read_text()


def once_written(step: int, act: Callable[[Any], None]) -> Callable[[Any], None]:
    """A change to a run: on rank 0 something happens as soon as a step's line is in metrics.jsonl."""

    def change(run: Any) -> None:
        if run.metrics_writer is None:
            return
        write = run.metrics_writer.write

        def write_and_act(metrics: dict[str, Any]) -> None:
            write(metrics)
            if metrics["step"] == step:
                act(run)

        run.metrics_writer.write = write_and_act

    return change


def fill_the_disk(run: Any, room: int = 0) -> None:
    """From here on, a file of this process takes so much more than metrics.jsonl has."""
    size = run.directory.metrics_file.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))


def run_out_of_space(full: RunConfig) -> list[Ended]:
    quiet_upstream()
    ended = run_to_its_end(full, once_written(1, partial(fill_the_disk, room=100)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [ended, run_to_its_end(full)]


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_once_there_is_room(root: Path) -> None:
    full = config(root, "full", checkpoint={"every_steps": 1, "export_at_end": False, "on_failure": "continue"})
    first, second = run_distributed(run_out_of_space, 2, full)
    (text,) = {ends[0].error[1] for ends in (first, second)}
    assert text.startswith(f"{full.output_dir}/") and text.endswith(
        "cannot be written (File too large); free some space"
    )
    assert first[1].error == ()
    assert [line["step"] for line in lines(full)] == list(range(STEPS + 1))


def refuse_metrics(run: Any) -> None:
    """The disk of metrics.jsonl does not take the second step's line; that of the checkpoints takes everything."""
    if run.metrics_writer is None:
        return
    write = run.metrics_writer.write

    def refuse(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            raise RunError("metrics.jsonl: cannot be written")
        write(metrics)

    run.metrics_writer.write = refuse


def train_without_room_for_metrics(torn: RunConfig) -> tuple[Ended, list[int], Ended]:
    quiet_upstream()
    refused = run_to_its_end(torn, refuse_metrics)
    return refused, CheckpointStore(torn.output_dir / "checkpoints").steps(), run_to_its_end(torn)


def test_a_step_whose_metrics_could_not_be_written_is_told_by_the_next_start(root: Path) -> None:
    values: dict[str, Any] = {"checkpoint": {"every_steps": 2, "export_at_end": False}}
    torn, whole = (config(root, name, 3, **values) for name in ("torn", "not_torn"))
    (refused, steps, went_on), _ = run_distributed(train_without_room_for_metrics, 2, torn)
    assert refused.error == ("RunError", "metrics.jsonl: cannot be written") and steps == [2]
    assert went_on.error == ()
    ends_of([whole])
    assert lines(torn) == lines(whole)


def meet_an_unfit_recording(run: Any) -> None:
    """In the third step."""
    watch = run.safeguards.watch_rollout

    def refuse(step: int, *rest: Any) -> None:
        if step == 3:
            raise ConfigError("rollout.temperature", 1.0, "must be what the recording has", "set it")
        watch(step, *rest)

    run.safeguards.watch_rollout = refuse


def train_on_an_unfit_recording(unfit: RunConfig) -> tuple[Ended, list[int]]:
    quiet_upstream()
    ended = run_to_its_end(unfit, meet_an_unfit_recording)
    return ended, CheckpointStore(unfit.output_dir / "checkpoints").steps()


def test_a_late_bad_input_takes_no_checkpoint_away(root: Path) -> None:
    unfit = config(root, "unfit", checkpoint={"every_steps": 2, "export_at_end": False})
    for ended, steps in run_distributed(train_on_an_unfit_recording, 2, unfit):
        assert ended.error[0] == "ConfigError" and steps == [2]


def ask_to_end(run: Any) -> None:
    """After the first step."""
    run.stop = StopRequest()
    once_written(1, lambda run: run.stop.ask("SIGTERM"))(run)


def begin_without_checkpoints(without: RunConfig, with_them: RunConfig) -> list[Ended]:
    quiet_upstream()
    return [run_to_its_end(without, ask_to_end), run_to_its_end(without), run_to_its_end(with_them)]


def test_a_run_without_checkpoints_is_not_begun_anew_unasked(root: Path) -> None:
    values: dict[str, Any] = {"export_at_end": False}
    without, with_them = (
        config(root, "without", 2, checkpoint=values | {"every_steps": every_steps}) for every_steps in (0, 1)
    )
    (asked, *again), _ = run_distributed(begin_without_checkpoints, 2, without, with_them)
    assert asked.error[1] == "it was asked to end after step 1, and checkpoint.every_steps = 0 saves nothing"
    for end in again:
        kind, text = end.error
        assert kind == "ConfigError"
        assert text.startswith(f"output_dir = {without.output_dir}: holds a run of 1 steps without a checkpoint")
    assert [line["step"] for line in lines(without)] == [0, 1]


def export_without_room(full: RunConfig) -> list[Ended]:
    quiet_upstream()
    ended = run_to_its_end(full, once_written(full.num_steps, fill_the_disk))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [ended, run_to_its_end(full)]


def test_an_export_without_room_ends_the_run_with_one_line_and_leaves_nothing(root: Path) -> None:
    full = config(root, "no_room", 1, evaluation={"num_prompts": 4})
    first, second = run_distributed(export_without_room, 2, full)
    (text,) = {ends[0].error[1] for ends in (first, second)}
    assert text.startswith(f"{full.output_dir}/.export.partial/shard-00000.safetensors: cannot be written (File too")
    assert first[1].error == ()
    assert sorted(path.name for path in full.output_dir.glob("*export*")) == ["export"]


def lose_the_directory(lost: RunConfig) -> Ended:
    quiet_upstream()
    return run_to_its_end(lost, once_written(1, lambda run: shutil.rmtree(run.directory.path)))


def replace_the_directory(run: Any) -> None:
    """Somebody moves the run away, another one begins in its place, and this one is asked to end."""
    run.directory.path.rename(run.directory.path.with_name("moved"))
    run.directory.path.mkdir()
    run.stop.ask("SIGTERM")


def lose_the_directory_to_another(lost: RunConfig) -> Ended:
    quiet_upstream()

    def change(run: Any) -> None:
        run.stop = StopRequest()
        once_written(1, replace_the_directory)(run)

    return run_to_its_end(lost, change)


def test_a_run_whose_directory_is_replaced_leaves_the_other_one_alone(root: Path) -> None:
    lost = config(root, "replaced", checkpoint={"every_steps": 100, "export_at_end": False})
    for ended in run_distributed(lose_the_directory_to_another, 2, lost):
        assert ended.error[1].startswith(f"{lost.output_dir}: was removed or replaced")
    assert list(lost.output_dir.iterdir()) == []


def test_a_run_whose_directory_is_removed_ends_and_makes_no_other(root: Path) -> None:
    lost = config(root, "lost", checkpoint={"every_steps": 0, "export_at_end": False})
    (ended,) = run_distributed(lose_the_directory, 1, lost)
    assert ended.error == (
        "RunError",
        f"{lost.output_dir}: was removed or replaced while the run was writing there; bring it back and start again, "
        "or begin anew",
    )
    assert not lost.output_dir.exists()


def stop_in_sync(asked: RunConfig) -> tuple[list[int], list[int]]:
    """Steps whose checkpoint was begun, and the whole ones, where a stop is asked for after the second step's began."""
    quiet_upstream()
    begun: list[int] = []

    def change(run: Any) -> None:
        run.stop = StopRequest()
        begin = run.checkpointer.begin

        def begin_and_ask(step: int) -> None:
            begun.append(step)
            begin(step)
            run.stop.ask("SIGTERM")

        run.checkpointer.begin = begin_and_ask

    with pytest.raises(StopRequested):
        run_to_its_end(asked, change)
    return begun, CheckpointStore(asked.output_dir / "checkpoints").steps()


def test_a_stop_completes_the_checkpoint_that_has_begun(root: Path) -> None:
    asked = config(root, "asked", checkpoint={"every_steps": 2, "export_at_end": False})
    assert run_distributed(stop_in_sync, 2, asked) == [([2], [2])] * 2


def surplus_and_returned(begun: RunConfig, other: RunConfig) -> list[tuple[int, int]]:
    """Surplus groups and returned prompts as a run goes on as it was, and twice under another configuration."""
    quiet_upstream()
    run_to_its_end(begun)
    found = []

    def look_and_end(run: Any) -> None:
        waves = run.rollout.controller._waves
        found.append((len(waves.surplus), len(waves.returned)))
        raise RunError("killed")

    for each in (begun, other, other):
        run_to_its_end(each, look_and_end)
    return found


def test_a_changed_run_that_is_killed_at_once_still_generates_anew(root: Path) -> None:
    values: dict[str, Any] = {"every_steps": 2, "export_at_end": False}
    rollout = {"over_sampling": 4.0, "carry_over_max_lag": 1, "max_response_tokens": 6}
    begun = config(root, "before", 2, rollout=rollout, checkpoint=values)
    other = config(
        root,
        "before",
        4,
        rollout=rollout | {"temperature": 0.5},
        checkpoint=values | {"accept_changes": ("rollout.temperature",)},
    )
    (as_it_was, first, second), *_ = run_distributed(surplus_and_returned, 1, begun, other)
    assert as_it_was[0] > 0 and as_it_was[1] == 0
    assert first == second == (0, as_it_was[0])


def run_with_others(mine: list[RunConfig]) -> list[Ended]:
    """Every rank goes by a configuration of its own."""
    quiet_upstream()
    return [run_to_its_end(mine[dist.get_rank()])]


def test_ranks_with_other_configurations_are_refused(root: Path) -> None:
    one, other = (config(root, "apart", 2, optimizer={"learning_rate": rate}) for rate in (1e-3, 1e-2))
    for (ended,) in run_distributed(run_with_others, 2, [one, other]):
        kind, text = ended.error
        assert kind == "ConfigError"
        assert text.startswith("optimizer.learning_rate = 0.01: rank 1 (") and "and rank 0 with 0.001" in text
    assert not one.output_dir.exists()


@pytest.mark.parametrize("place", ["gone", "a link to nowhere", "a file"])
def test_a_run_without_its_checkpoints_keeps_its_metrics(root: Path, place: str) -> None:
    each = config(root, f"without {place}", 2, checkpoint={"every_steps": 1, "export_at_end": False})
    ends_of([each])
    folder = each.output_dir / "checkpoints"
    folder.rename(folder.with_name("elsewhere"))
    if place == "a link to nowhere":
        folder.symlink_to(root / "not_mounted")
    elif place == "a file":
        folder.touch()
    kind, text = ends_of([replace(each, num_steps=3)])[0].error
    assert kind == "ConfigError" and text.startswith(f"output_dir = {each.output_dir}: ")
    assert len(lines(each)) == 3
