"""Whether a run may go on, by what its directory holds."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.load import dump_config
from megatron_fipo.runtime.earlier_run import check_against_earlier
from megatron_fipo.runtime.errors import BreakdownError
from megatron_fipo.runtime.run_dir import RunDirectory
from tests.unit.config.test_sections import run_config


@pytest.mark.parametrize(
    ("before", "now", "step", "is_refused"),
    [
        (10, 10, 19, False),
        (10, 10, 20, True),
        (100, 10, 60, False),
        (10, 100, 60, True),
        (0, 10, 1, True),
        (10, 0, 1, True),
    ],
)
def test_a_run_without_a_checkpoint_begins_anew_where_two_were_not_due(
    tmp_path: Path, before: int, now: int, step: int, is_refused: bool
) -> None:
    earlier, config = (run_config(checkpoint=CheckpointConfig(every_steps=steps)) for steps in (before, now))
    directory = RunDirectory.create(tmp_path, dump_config(earlier))
    directory.append_metrics({"step": step, "rollout/reward_mean": 0.5})
    text = f"holds a run of {step} steps without a checkpoint"
    with pytest.raises(ConfigError, match=text) if is_refused else nullcontext():
        check_against_earlier(config, directory)
    # It has had one, which is gone.
    directory.saved_file.touch()
    with pytest.raises(ConfigError, match=text):
        check_against_earlier(config, directory)


def test_a_configuration_that_cannot_be_read_is_no_other_releases(tmp_path: Path) -> None:
    # Opened, but not read.
    (tmp_path / "config.yaml").symlink_to("/proc/self/mem")
    with pytest.raises(BreakdownError, match=r"config.yaml: cannot be read \(Input/output error\), .*; mend that, and"):
        check_against_earlier(run_config(), RunDirectory(tmp_path))
