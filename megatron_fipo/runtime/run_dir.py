"""The run directory: resolved configuration, metrics, samples, logs."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.runtime.json_files import append_lines


class RunDirectory:
    """Files of one run; written by rank 0 alone.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check(path: Path) -> None:
        """Refuse a path that cannot become a run directory, without touching it.

        Raises:
            ConfigError: It is a file, a directory that holds something, or a place that this user may not write to.
        """
        try:
            taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
            nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
            writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        except OSError:
            taken, writable = False, False
        require(
            not taken,
            field="output_dir",
            value=path,
            rule="must be a new or empty directory, and it is not",
            way_out="choose another directory or remove this one",
        )
        require(
            writable,
            field="output_dir",
            value=path,
            rule="must be a directory that this user may write to",
            way_out="choose another directory or mend its permissions",
        )

    @classmethod
    def create(cls, path: Path, config_yaml: str) -> "RunDirectory":
        """Make the directory and write config.yaml.

        Raises:
            ConfigError: See `check`; or the directory cannot be made.
        """
        cls.check(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.yaml").write_text(config_yaml, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                field="output_dir",
                value=path,
                rule=f"must be a directory that can be made ({error.strerror})",
                way_out="choose a directory that this user may write to",
            ) from error
        return cls(path)

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file at the top of the directory."""
        (self.path / name).write_text(text, encoding="utf-8")

    @property
    def rollouts(self) -> Path:
        """Folder of recorded rollout batches."""
        return self.path / "rollouts"

    @property
    def servers(self) -> Path:
        """Folder of the servers' logs, and of the address that agents on rollout nodes look for."""
        return self.path / "servers"

    @property
    def journal(self) -> Path:
        """Folder of the batches that servers generated, written before they are used."""
        return self.path / "journal"

    @property
    def weights(self) -> Path:
        """Folder of weights on their way to servers."""
        return self.path / "weights"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder of the Hugging Face export."""
        return self.path / "export"

    def evaluation(self, step: int) -> Path:
        """Folder of the evaluation after a step."""
        return self.path / "evaluations" / f"step_{step}"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; numbers that are not finite become null, at any depth."""
        append_lines(self.path / "metrics.jsonl", [metrics])

    def append_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to samples.jsonl."""
        append_lines(self.path / "samples.jsonl", samples)
