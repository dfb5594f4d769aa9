"""Folders that are there whole or not at all."""

import fcntl
import os
import shutil
from pathlib import Path

from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.runtime.files.contents import contents
from megatron_fipo.runtime.files.disk_errors import size_text
from megatron_fipo.runtime.files.whole_file import wait_for_disk


class WholeFolder:
    """A new folder that is written under a hidden name beside its place, and takes its name when it is complete.

    Args:
        target: The folder; must not exist, or be empty.
        field: What the user calls it, for messages.
    """

    def __init__(self, target: Path, field: str) -> None:
        # A folder that is named by dots alone, such as the current one, has its own name only once it is resolved.
        self.target = target if target.name not in ("", "..") else target.resolve()
        self.field = field
        self.partial = self.target.parent / f".{self.target.name}.partial"
        self._handle: int | None = None

    def check(self) -> Path:
        """See that the folder can be made; returns the nearest folder above it that exists.

        Raises:
            ConfigError: The target is taken, or its parent may not be written to.
        """
        taken = self.target.is_symlink() or self.target.exists()
        if taken and self.target.is_dir() and not self.target.is_symlink():
            taken = any(self.target.iterdir())
        require(
            not taken,
            field=self.field,
            value=self.target,
            rule="must be a new or empty folder, and it is not",
            way_out="choose another folder or remove this one",
        )
        nearest = next(place for place in self.target.absolute().parents if place.exists())
        require(
            nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
            field=self.field,
            value=self.target,
            rule=f"must be in a folder that this user may write to, and {nearest} is none",
            way_out="choose another folder or mend its permissions",
        )
        return nearest

    def begin(self, num_bytes: int) -> None:
        """Make the hidden folder; what an interrupted attempt left there is removed.

        Args:
            num_bytes: Space that its files will take.

        Raises:
            ConfigError: See `check`; or another process writes it, or there is not so much space.
            OSError: The disk refuses for another reason.
        """
        nearest = self.check()
        if self.partial.exists():
            self._hold()
            shutil.rmtree(self.partial)
        free = shutil.disk_usage(nearest).free
        require(
            free >= num_bytes,
            field=self.field,
            value=self.target,
            rule=f"needs {size_text(num_bytes)}, and {size_text(free)} are free there",
            way_out="free some space, or choose a folder on another disk",
        )
        self.partial.mkdir(parents=True)
        self._hold()

    def _hold(self) -> None:
        """Lock the hidden folder, as long as this process lives, so that nobody else takes it for a remnant."""
        self._let_go()
        handle = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(
                field=self.field,
                value=str(self.target),
                rule=f"is being written by another process, into {self.partial}",
                way_out="wait for its end, or choose another folder",
            ) from error
        except OSError:
            # Some file systems have no locks.
            os.close(handle)
            return
        self._handle = handle

    def _let_go(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def commit(self) -> None:
        """Give the folder its name; what was written is on disk.

        Raises:
            OSError: The disk refuses.
        """
        files, folders = contents(self.partial)
        for path in (*files, *folders, self.partial):
            wait_for_disk(path)
        self.partial.rename(self.target)
        wait_for_disk(self.target.absolute().parent)
        self._let_go()

    def abandon(self) -> None:
        """Remove what was written since `begin`; a disk that refuses leaves it to the next attempt."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self._let_go()
