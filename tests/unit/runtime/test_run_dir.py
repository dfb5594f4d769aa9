import json
import math
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.runtime.errors import BreakdownError, RunError
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.run_lock import hold_run_directory
from tests.unit.runtime.test_checkpoint_store import as_a_user

TAKEN = "must be a new or empty directory, and it is not; choose another directory or remove this one"


def test_a_new_directory_gets_the_configuration(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "a" / "b", "note: π\n")
    assert (tmp_path / "a" / "b" / "config.yaml").read_bytes() == "note: π\n".encode()
    assert directory.rollouts == tmp_path / "a" / "b" / "rollouts"
    assert directory.export == tmp_path / "a" / "b" / "export"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    RunDirectory.check(tmp_path)
    RunDirectory.create(tmp_path, "")
    with pytest.raises(ConfigError, match=r"^output_dir = .*: must be a new or empty directory"):
        RunDirectory.create(tmp_path, "")


def test_what_a_run_left_that_ended_before_it_began_is_no_run(tmp_path: Path) -> None:
    for name in (".lock", ".lock.node3.17", "last_breakdown", ".last_breakdown.17", ".config.yaml.partial"):
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()
    assert not RunDirectory(tmp_path).has_run
    directory = RunDirectory.create(tmp_path, "")
    assert directory.has_run
    with pytest.raises(ConfigError, match="must be a new or empty directory"):
        RunDirectory.check(tmp_path)
    RunDirectory.check(tmp_path, may_have_run=True)


@pytest.mark.parametrize(("has_metrics", "left"), [(True, [0, 1, 2]), (False, [0, 1])])
def test_later_steps_and_half_lines_are_forgotten(tmp_path: Path, has_metrics: bool, left: list[int]) -> None:
    directory = RunDirectory.create(tmp_path, "")
    directory.forget_after(2)
    for step in range(4):
        directory.append_metrics({"step": step, "rollout/reward_mean": 0.5})
        directory.append_samples([{"step": step}, {"step": step}])
    with directory.metrics_file.open("a") as file:
        file.write('{"step": 4')
    assert directory.last_step == 3
    for folder, names in (
        (directory.rollouts, ("rollout_000002.npz", "rollout_000003.npz", "rollout_1000000.routing")),
        (directory.tokens, ("step_000002.npz", "step_000003.npz")),
        (directory.weights, ("version_3",)),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    for step in (2, 3):
        directory.evaluation(step).mkdir(parents=True)
        (directory.evaluation(step) / "problems.jsonl").touch()
    directory.forget_after(2, has_metrics)
    assert [path.name for path in directory.rollouts.iterdir()] == ["rollout_000002.npz"]
    assert [path.name for path in directory.tokens.iterdir()] == ["step_000002.npz"]
    assert list(directory.evaluations.iterdir()) == [directory.evaluation(2)]
    assert not directory.weights.exists()
    assert [json.loads(line)["step"] for line in directory.metrics_file.read_text().splitlines()] == left
    assert [json.loads(line)["step"] for line in directory.samples_file.read_text().splitlines()] == [0, 0, 1, 1, 2, 2]


def test_files_that_a_killed_run_left_half_are_removed(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "")
    directory.journal.mkdir()
    for path in (tmp_path / ".effective_algorithm.txt.partial", directory.journal / ".step_000002.npz.partial"):
        path.touch()
    (directory.journal / "step_000001.npz").touch()
    (tmp_path / ".export.partial").mkdir()
    directory.remove_remnants()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"config.yaml", "journal", "journal/step_000001.npz", ".export.partial"}


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_directory_that_is_removed_or_replaced_under_a_run_ends_it(tmp_path: Path, comes_back: bool) -> None:
    path = tmp_path / "run"
    with hold_run_directory(path) as is_here:
        directory = RunDirectory(path, is_here)
        directory.append_metrics({"step": 1})
        shutil.rmtree(path)
        if comes_back:
            with hold_run_directory(path):
                RunDirectory.create(tmp_path / "run", "")
        with pytest.raises(RunError, match="run: was removed or replaced while the run was writing there"):
            directory.append_metrics({"step": 2})
    assert not (path / "metrics.jsonl").exists()


def test_an_export_is_set_aside_under_the_step_that_it_is_of(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "")
    assert directory.last_step is None and directory.set_export_aside(0) is None
    directory.export.mkdir()
    assert directory.set_export_aside(4) == tmp_path / "export_step_4", "its metrics are gone"
    directory.append_metrics({"step": 7, "rollout/reward_mean": 0.5})
    directory.append_metrics({"step": 8, "eval/accuracy": 0.5})
    directory.export.mkdir()
    assert directory.set_export_aside(6) == tmp_path / "export_step_7"
    assert not directory.export.exists()


def test_an_export_that_is_set_aside_takes_the_place_of_nothing(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "")
    (tmp_path / "export_step_3").write_text("mine")
    (tmp_path / "export_step_3_2").symlink_to("nowhere")
    for name in ("export_step_3_3", "export_step_3_4"):
        directory.export.mkdir()
        assert directory.set_export_aside(3) == tmp_path / name
    assert (tmp_path / "export_step_3").read_text() == "mine"


def test_an_export_that_leads_nowhere_is_told_before_anything_is_done(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", "")
    directory.export.symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match="run/export is a link that leads nowhere, so .*; remove the link, or bring"):
        RunDirectory.check(directory.path, may_have_run=True)
    (tmp_path / "disk").mkdir()
    RunDirectory.check(directory.path, may_have_run=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("line", ['{"a": 1}', '{"step": "7"}', '{"step": true}'])
def test_a_line_that_the_run_did_not_write_is_refused_and_nothing_cut(tmp_path: Path, name: str, line: str) -> None:
    directory = RunDirectory.create(tmp_path, "")
    directory.check_lines()
    content = f'{{"step": 0}}\n{line}\n{{"step": 1}}\n'
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ConfigError, match=f"^output_dir = .*: line 2 of {name} is of no step, so .*; remove that line$"
    ):
        directory.check_lines()
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize(
    ("end", "is_refused"),
    [
        ('{"st', False),
        ("no JSON\n", False),
        ('no JSON\n{"step": 1}\n', True),
        ('\n{"step": 1}\n', True),
        ("\n\n", False),
        ("[" * 200_000 + "\n", False),
    ],
)
def test_a_broken_line_is_a_killed_runs_at_the_end_alone(tmp_path: Path, end: str, is_refused: bool) -> None:
    directory = RunDirectory.create(tmp_path, "")
    for path in (directory.samples_file, directory.metrics_file):
        path.write_text('{"step": 0}\n' + end)
    with pytest.raises(ConfigError, match="line 2 of metrics.jsonl") if is_refused else nullcontext():
        directory.check_lines()


@pytest.mark.parametrize(
    ("behind", "is_refused"),
    [
        (["no JSON", '{"step": 2}', '{"step": 2}'], False),
        (["no JSON", '{"step": 1}', '{"step": 2}'], True),
        (["no JSON", "nor this", '{"step": 1}', "", '{"step": 2}', '{"st'], True),
    ],
)
def test_a_crash_breaks_samples_of_one_step_alone(tmp_path: Path, behind: list[str], is_refused: bool) -> None:
    directory = RunDirectory.create(tmp_path, "")
    directory.samples_file.write_text("\n".join(['{"step": 0}', *behind, ""]))
    with pytest.raises(ConfigError, match="line 2 of samples.jsonl") if is_refused else nullcontext():
        directory.check_lines()


def test_metrics_that_cannot_be_read_are_no_foreign_ones(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "")
    # Opened, but not read.
    directory.metrics_file.symlink_to("/proc/self/mem")
    with pytest.raises(BreakdownError, match=r"metrics.jsonl: cannot be read \(Input/output error\)"):
        directory.check_lines()
    directory.metrics_file.unlink()
    directory.metrics_file.mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl: is something else \(Is a directory\)"):
        directory.check_lines()


def test_a_directory_that_may_not_be_entered_is_refused() -> None:
    # pytest's own folders are its user's alone.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        for path in (folder, folder / "run" / "first"):
            with as_a_user(), pytest.raises(ConfigError, match="must be a directory that this user may write to"):
                RunDirectory.check(path, may_have_run=True)


def test_metrics_may_be_a_link_as_long_as_it_leads_somewhere(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", "")
    directory.metrics_file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"metrics.jsonl is a link that leads nowhere; remove the link, or bring"):
        directory.check_lines()
    (tmp_path / "elsewhere").write_text('{"step": 1}\n{"step": 2}\n')
    directory.check_lines()
    directory.forget_after(1)
    assert directory.metrics_file.is_symlink()
    assert (tmp_path / "elsewhere").read_text() == '{"step": 1}\n'


def test_steps_that_lost_their_metrics_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = RunDirectory.create(tmp_path, "")
    for step in (0, 1, 2):
        directory.append_metrics({"step": step})
    directory.forget_after(-1)
    for step in (0, 1):
        directory.append_metrics({"step": step})
    directory.forget_after(1)
    directory.forget_after(2, has_metrics=False)
    assert caplog.messages == []
    directory.metrics_file.unlink()
    directory.forget_after(3)
    (told,) = caplog.messages
    assert told.startswith(
        f"{directory.metrics_file} has no line of 3 of the 3 steps that are done, from step 1 on; it"
    )


def test_a_removed_directory_can_be_made_again(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", "")
    directory.servers.mkdir()
    (directory.servers / "server0.log").write_text("starting")
    directory.remove()
    assert list(tmp_path.iterdir()) == []
    RunDirectory.create(tmp_path / "run", "")


def test_checking_makes_nothing(tmp_path: Path) -> None:
    RunDirectory.check(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_path_that_is_taken_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "export").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    with pytest.raises(ConfigError) as caught:
        RunDirectory.check(path)
    assert str(caught.value) == f"output_dir = {path}: {TAKEN}"


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    with pytest.raises(ConfigError) as caught:
        RunDirectory.create(path, "")
    assert str(caught.value) == (
        f"output_dir = {path}: must be a directory that this user may write to; choose another directory or mend its "
        "permissions"
    )


def lines(path: Path) -> list[object]:
    def refuse(constant: str) -> object:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "")
    directory.append_metrics({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": None})
    directory.append_metrics({"step": 2, "by_update": [1.0, math.nan], "deep": {"x": (math.inf, [2])}})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": None, "b": None, "c": None, "d": 0.1, "e": None},
        {"step": 2, "by_update": [1.0, None], "deep": {"x": [None, [2]]}},
    ]


def test_samples_keep_their_text(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "")
    directory.append_samples([{"response": "zwölf\n≤ 3\u2028"}, {"response": "b"}])
    directory.append_samples([])
    directory.append_samples([{"response": "c"}])
    content = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert "zwölf" in content
    assert [json.loads(line)["response"] for line in content.split("\n")[:-1]] == ["zwölf\n≤ 3\u2028", "b", "c"]


def test_a_prompts_lone_surrogate_is_written(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "")
    directory.append_samples([{"prompt": "a\ud800b"}])
    assert json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8")) == {"prompt": "a\ud800b"}
