"""Where a conversion may write."""

from pathlib import Path

from megatron_fipo.config.base import require
from megatron_fipo.runtime.checkpoint_store import MANIFEST_FILE
from megatron_fipo.runtime.files.whole_folder import WholeFolder
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.trainer.convert.options import told
from megatron_fipo.trainer.convert.source import CHECKPOINTS


def check_target(target: Path) -> None:
    """See that a folder can be made at a place, before hours are spent on its contents.

    Raises:
        ConfigError: The place is taken, may not be written to, or is inside a checkpoint, among a run's checkpoints or
            inside a model folder, which would not be what they were any more.
        ConversionError: The disk refuses.
    """
    with told(target, "cannot be made"):
        WholeFolder(target, "OUT").check()
        for place in target.resolve().parents:
            require(
                not (what := _whole_thing(place)),
                field="OUT",
                value=target,
                rule=f"must not lie in {place}, which is {what}",
                way_out="choose a folder beside it",
            )


def _whole_thing(place: Path) -> str:
    """What a folder is that must stay as it is; "" where it is none."""
    if (place / MANIFEST_FILE).is_file():
        return "a checkpoint"
    if place.name == CHECKPOINTS and RunDirectory(place.parent).has_run:
        return "where a run has its checkpoints"
    return "a model folder" if (place / "config.json").is_file() and any(place.glob("*.safetensors")) else ""
