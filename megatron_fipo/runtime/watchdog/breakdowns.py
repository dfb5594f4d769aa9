"""How often a run has broken down since its last checkpoint: an automatic restart must not go on for ever."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.exit_codes import FAILED, GO_ON
from megatron_fipo.runtime.run_dir import BREAKDOWN_FILE, RunDirectory


def breakdown_statuses(folder: Path) -> Callable[[], int]:
    """What gives the exit status where a rank has died or the run hangs.

    `GO_ON`, so that the run is started again, but `FAILED` where it broke down before and has no newer checkpoint now.

    Args:
        folder: The run directory; what it says of earlier attempts is read at once.
    """
    path, before = folder / BREAKDOWN_FILE, None
    with suppress(OSError, ValueError):
        before = int(path.read_text())

    def status() -> int:
        newest = -1
        with suppress(OSError):
            newest = max(CheckpointStore(RunDirectory(folder).checkpoints).steps(), default=-1)
        with suppress(OSError):
            # Several ranks may write the same.
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(str(newest))
            partial.rename(path)
        return FAILED if newest == before else GO_ON

    return status
