"""Whether a run may go on with its configuration: it may have been begun with another one."""

from pathlib import Path

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import source_names
from megatron_fipo.config.load import load_config, plain_values
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.run_changes import (
    Change,
    changes_between,
    check_changes,
    field_names,
    require_same_sources,
    touch_samples,
)
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.errors import CheckpointError, RunError
from megatron_fipo.runtime.files.disk_errors import MEND, read_errors_told
from megatron_fipo.runtime.run_dir import RunDirectory


def check_against_earlier(config: RunConfig, directory: RunDirectory) -> list[Change]:
    """Compare a run's configuration with the one that its directory was begun with.

    Args:
        config: What the run is to go on with.
        directory: Its directory; one in which no run has begun fits everything.

    Returns:
        Every difference, all of which are accepted.

    Raises:
        ConfigError: Its configuration is another release's; its checkpoints cannot be found; it has none although it
            had one or two were due, or it was or is to write none; its metrics have a line that it did not write; its
            prompts come from sources of other names; or a field has changed that must not, or that
            `checkpoint.accept_changes` has to name.
        BreakdownError: Its configuration, checkpoints or metrics cannot be read.
    """
    if not directory.has_run:
        return []
    with read_errors_told(directory.config_file, RunError, MEND):
        directory.config_file.read_bytes()
    try:
        earlier = load_config(RunConfig, directory.config_file)
    except ConfigError as error:
        raise ConfigError(
            field="output_dir",
            value=directory.path,
            rule=f"this release cannot read the run's own configuration ({error})",
            way_out="go on with the release that began the run, or choose another directory",
        ) from error
    directory.check_lines()
    _check_that_it_goes_on(earlier.checkpoint.every_steps if config.checkpoint.every_steps else 0, directory)
    if earlier.data is not None and config.data is not None:
        require_same_sources(source_names(earlier.data.train), source_names(config.data.train))
    before, now = plain_values(earlier), plain_values(config)
    changes = changes_between(before, now)
    check_changes(changes, config.checkpoint.accept_changes, [*field_names(before), *field_names(now)])
    return changes


def has_other_samples(config: RunConfig, config_file: Path) -> bool:
    """Whether a run has, or may have, generated other samples with the configuration in a file than it would now."""
    try:
        earlier = plain_values(load_config(RunConfig, config_file))
    except ConfigError:
        return True
    return touch_samples(changes_between(earlier, plain_values(config)))


def _check_that_it_goes_on(every_steps: int, directory: RunDirectory) -> None:
    """Refuse to begin a run anew that is not meant to."""
    try:
        with read_errors_told(directory.checkpoints, way_out=MEND):
            steps = CheckpointStore(directory.checkpoints).steps()
    except CheckpointError as problem:
        raise ConfigError(
            field="output_dir",
            value=directory.path,
            rule=f"the checkpoints of its run cannot be found: {problem}",
            way_out="bring them back, or choose another directory",
        ) from problem
    # The first one may have been on its way when the run was killed.
    if not steps and (step := directory.last_step) and (directory.has_saved or step >= 2 * every_steps):
        raise ConfigError(
            field="output_dir",
            value=directory.path,
            rule=f"holds a run of {step} steps without a checkpoint, which would begin anew and lose them",
            way_out="bring its checkpoints back, choose another directory, or remove this one",
        )
