"""The directory of `megatron-fipo evaluate`: which evaluation it is of, and how one that stopped goes on."""

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.evaluate import EvaluateConfig
from megatron_fipo.config.load import CONFIG_FILE, dump_config, load_config
from megatron_fipo.runtime.files.json_files import write_json
from megatron_fipo.runtime.run_dir import RunDirectory, comes_before_run

_INPUTS = "inputs.json"
# What is there before it.
_FIRST = frozenset({CONFIG_FILE, f".{_INPUTS}.partial"})


def prepare_directory(config: EvaluateConfig, fingerprints: Mapping[str, str]) -> None:
    """Make the directory, or find that it holds the same evaluation.

    Args:
        config: The evaluation.
        fingerprints: Digest of each input's content, by the field that names the input.

    Raises:
        ConfigError: It holds something else, or an evaluation with other settings or inputs.
    """
    folder = config.output_dir
    inputs = folder / _INPUTS
    if not inputs.is_file() and not _is_half_made(folder):
        RunDirectory.create(folder, dump_config(config))
    for field, mine, theirs in _differences(config, load_config(EvaluateConfig, folder / CONFIG_FILE), ""):
        raise _other_evaluation(folder, field, mine, f"was {theirs}")
    if not inputs.is_file():
        write_json(inputs, fingerprints)
    known = json.loads(inputs.read_text(encoding="utf-8"))
    for field, digest in fingerprints.items():
        if known.get(field) != digest:
            raise _other_evaluation(
                folder, field, f"content {digest[:12]}", f"had content {str(known.get(field))[:12]}"
            )


@contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a prepared directory; the kernel lets it go with this process.

    Raises:
        ConfigError: Another process holds it.
    """
    with (folder / _INPUTS).open("r+b") as file:
        # Some network file systems have no locks; there it is up to the user.
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                rule = "another process is writing its evaluation into it"
                raise ConfigError(
                    "output_dir", folder, rule, "wait for that one, or choose another directory"
                ) from error
        yield


def _is_half_made(folder: Path) -> bool:
    """Whether it is one that its evaluation was killed over, which has begun nothing yet."""
    names = {each.name for each in folder.iterdir()} if (folder / CONFIG_FILE).is_file() else {""}
    return all(name in _FIRST or comes_before_run(name) for name in names)


def _other_evaluation(folder: Path, field: str, value: object, rule: str) -> ConfigError:
    return ConfigError(
        field=field,
        value=value,
        rule=f"{rule} in the evaluation that {folder} holds, and results of both would mix",
        way_out="set it back to go on with that one, or choose another output_dir",
    )


def _differences(mine: Any, theirs: Any, path: str) -> Iterator[tuple[str, object, object]]:
    """Fields that differ, dotted, with both values. Paths do not count: what lies there does."""
    if isinstance(mine, Path) and isinstance(theirs, Path):
        return
    if dataclasses.is_dataclass(mine) and type(mine) is type(theirs):
        for field in dataclasses.fields(mine):
            dotted = f"{path}.{field.name}" if path else field.name
            yield from _differences(getattr(mine, field.name), getattr(theirs, field.name), dotted)
    elif isinstance(mine, tuple) and isinstance(theirs, tuple) and len(mine) == len(theirs):
        for place, pair in enumerate(zip(mine, theirs, strict=True)):
            yield from _differences(*pair, f"{path}.{place}")
    elif mine != theirs:
        yield path, mine, theirs
