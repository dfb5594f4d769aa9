"""The run directory: resolved configuration, metrics, samples, logs."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError


class RunDirectory:
    """Files of one run; written by rank 0 alone.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config_yaml: str) -> "RunDirectory":
        """Make the directory and write config.yaml.

        Raises:
            ConfigError: The directory already holds a run.
        """
        if path.exists() and any(path.iterdir()):
            raise ConfigError(
                field="output_dir",
                value=str(path),
                rule="must be new or empty, and it is not",
                way_out="choose another directory or remove this one",
            )
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config_yaml)
        return cls(path)

    @property
    def rollouts(self) -> Path:
        """Folder of recorded rollout batches."""
        return self.path / "rollouts"

    @property
    def export(self) -> Path:
        """Folder of the Hugging Face export."""
        return self.path / "export"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; numbers that are not finite become null."""
        self._append("metrics.jsonl", [metrics])

    def append_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to samples.jsonl."""
        self._append("samples.jsonl", samples)

    def _append(self, name: str, objects: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(_finite(each), ensure_ascii=False) + "\n" for each in objects]
        with (self.path / name).open("a") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())


def _finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in metrics.items()
    }
