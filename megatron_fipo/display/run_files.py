"""A run directory as a reader finds it, finished or still being written."""

import json
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.display.token_file import TokenFileError, TokenRecords, load_tokens, token_path
from megatron_fipo.runtime.files.json_files import read_whole_lines


class RunFiles:
    """What a run has written so far; a line that is not whole yet is not there yet.

    Args:
        path: The run directory.

    Attributes:
        steps: The line of metrics.jsonl of every step, by step.

    Raises:
        ConfigError: It is no run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "metrics.jsonl"
        if not file.is_file():
            problem = f"has no {file.name}" if path.is_dir() else "does not exist"
            way_out = "name the output_dir of a run that has begun its first step"
            raise ConfigError("RUN", path, f"must be a run directory, and {problem}", way_out)
        lines, _ = read_whole_lines(file)
        self.steps: dict[int, dict[str, Any]] = {
            line["step"]: line for line in lines if isinstance(line.get("step"), int)
        }

    def metrics(self, step: int) -> dict[str, Any]:
        """A step's metrics.

        Raises:
            ConfigError: The run has no such step.
        """
        if step not in self.steps:
            written = f"{min(self.steps)} to {max(self.steps)}" if self.steps else "none so far"
            raise ConfigError("--step", step, f"{self.path} has no such step", f"it has {written}")
        return self.steps[step]

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The step's lines of samples.jsonl, in order; where there are none, what its token records tell."""
        file = self.path / "samples.jsonl"
        lines = read_whole_lines(file)[0] if file.is_file() else []
        found = [line for line in lines if line.get("step") == step]
        if not found and (records := self.tokens(step)) is not None:
            found = [{"step": step, "sequence": int(sequence)} for sequence in records.sequences]
        return found

    @property
    def dumps(self) -> dict[str, str]:
        """What every update that was kept is about, by the name of its folder; what cannot be read is left out."""
        found = {}
        for file in sorted(self.path.glob("dumps/step_*/dump.json")):
            try:
                told = json.loads(file.read_bytes())
                fault = told["fault"]["text"] or "asked for"
                found[file.parent.name] = f"update {told['place']['update']}: {fault}"
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def tokens(self, step: int) -> TokenRecords | None:
        """The step's token records, or None where none were written.

        Raises:
            ConfigError: The file cannot be read.
        """
        path = token_path(self.path, step)
        if not path.is_file():
            return None
        try:
            return load_tokens(path)
        except TokenFileError as error:
            way_out = "choose another step; the responses' text is in samples.jsonl"
            raise ConfigError("--step", step, f"{path} {error}", way_out) from error
