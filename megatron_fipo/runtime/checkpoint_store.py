"""A folder of checkpoints, each of which is there complete or not at all.

A checkpoint is written under a hidden name beside its place. Its manifest comes last and names every file with size and
SHA-256; then the folder takes its name. Written and renamed by rank 0 alone, on a file system that all ranks share.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron_fipo
from megatron_fipo.runtime.errors import CheckpointError, RunError
from megatron_fipo.runtime.files.contents import contents
from megatron_fipo.runtime.files.disk_errors import MEND, disk_errors_told, read_errors_told, size_text
from megatron_fipo.runtime.files.hashed_file import FileRecord, hash_file, hash_files
from megatron_fipo.runtime.files.json_files import write_json
from megatron_fipo.runtime.files.whole_file import wait_for_disk
from megatron_fipo.runtime.retention import Retention

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

_NAME = re.compile(r"step_(0|[1-9][0-9]*)")
_PARTIAL = re.compile(r"\.step_[0-9]+\.(partial|removed)")
_PACKAGES = ("torch", "megatron-core")
# What is free must exceed the estimate: file systems need space for themselves.
_SPARE = 1.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: Finished steps.
        layout: Sizes of the process grid that wrote it.
        versions: Releases that wrote it, by package.
        score: What `Retention.keep_best` ranks it by, where there is one.
        metric: What the score is of, where there is one.
        files: Every other file, by its path in the folder.
    """

    step: int
    layout: Mapping[str, int]
    versions: Mapping[str, str]
    score: float | None
    metric: str | None
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
    """

    path: Path
    manifest: Manifest


class NewerFormatError(CheckpointError):
    """A checkpoint that a later release wrote."""


class CheckpointStore:
    """The checkpoints of a run; nobody else may write to its folder.

    Args:
        folder: The folder; made with the first checkpoint.
        retention: Which checkpoints stay.
        free_bytes: Free space of the file system that holds a path.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention | None = None,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        self.folder, self.retention, self._free_bytes = folder, retention or Retention(), free_bytes

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step_{step}"

    def partial(self, step: int) -> Path:
        """Folder that a step's checkpoint is written into."""
        return self.folder / f".step_{step}.partial"

    def clean(self) -> list[str]:
        """Remove what killed saves and removals left behind; at the start of a run.

        Returns:
            Names of what was removed.

        Raises:
            CheckpointError: The folder may not be written to.
        """
        with disk_errors_told(self.folder, "cannot be cleaned of unfinished checkpoints"):
            found = [name for name in self._names() if _PARTIAL.fullmatch(name)]
            for name in found:
                shutil.rmtree(self.folder / name)
        return sorted(found)

    def begin(self, step: int, num_bytes: int) -> Path:
        """Make the folder that a checkpoint is to be written into.

        Args:
            step: Finished steps.
            num_bytes: Estimate of its size.

        Raises:
            CheckpointError: There is not so much space, or the folder cannot be made.
        """
        partial = self.partial(step)
        with disk_errors_told(partial, "cannot be made"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if partial.exists():
                shutil.rmtree(partial)
            free = self._free_bytes(self.folder)
            if free < num_bytes * _SPARE:
                raise CheckpointError(
                    f"{self.folder}: {size_text(free)} are free and a checkpoint needs "
                    f"{size_text(num_bytes * _SPARE)}; free some space, lower checkpoint.keep_last, or take another "
                    "output_dir"
                )
            partial.mkdir()
        return partial

    def abandon(self, step: int) -> None:
        """Remove what was written of a checkpoint that failed; a disk that refuses is left to the next `clean`."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def commit(
        self, step: int, layout: Mapping[str, int], written: Mapping[str, FileRecord], score: float | None = None
    ) -> Checkpoint:
        """Complete a checkpoint; when this returns, it is on disk under its name. Then remove those that need not stay.

        Args:
            step: Finished steps.
            layout: Sizes of the process grid.
            written: Files that are on disk already, by path in the folder; others are hashed and waited for here.
            score: Its `Retention.best_metric`; one that is not finite counts as none.

        Raises:
            CheckpointError: It cannot be completed; there is none of this step then.
        """
        partial, path = self.partial(step), self.path(step)
        with disk_errors_told(partial, "cannot be completed"):
            manifest = write_manifest(partial, step, layout, written, score, self.retention.best_metric)
            if path.exists():
                _remove(path)
            partial.rename(path)
            wait_for_disk(self.folder)
        checkpoint = Checkpoint(path, manifest)
        self._prune(checkpoint)
        return checkpoint

    def set_aside_after(self, step: int) -> list[str]:
        """Rename later checkpoints, so that a run that goes on from this step is not mixed up with the one before.

        Args:
            step: The step that the run goes on from.

        Returns:
            Their new names.

        Raises:
            CheckpointError: The folder may not be written to.
        """
        renamed = []
        with disk_errors_told(self.folder, "cannot be written"):
            for later in (each for each in self.steps() if each > step):
                aside = self.folder / f"{self.path(later).name}.set_aside"
                if aside.exists():
                    shutil.rmtree(aside)
                self.path(later).rename(aside)
                renamed.append(aside.name)
        return renamed

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; whether they are valid is not looked at.

        Raises:
            OSError: The folder cannot be listed, is something else, or a link that leads nowhere.
        """
        return sorted(int(found[1]) for name in self._names() if (found := _NAME.fullmatch(name)))

    def read(self, step: int, check_hashes: bool = False) -> Checkpoint:
        """A checkpoint, checked: manifest, names and sizes, on request every byte.

        Raises:
            CheckpointError: It is damaged; the text names file and fault.
            NewerFormatError: A later release wrote it.
        """
        path = self.path(step)
        checkpoint = read_checkpoint(path, check_hashes)
        if checkpoint.manifest.step != step:
            raise CheckpointError(
                f"{path / MANIFEST_FILE}: is of step {checkpoint.manifest.step}; the folder was renamed"
            )
        return checkpoint

    def newest_valid(self, check_hashes: bool = True, before: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that is not damaged, None where there are none; the log warns of every damaged one.

        Args:
            check_hashes: Whether to read every byte.
            before: Look at older ones than of this step alone.

        Raises:
            CheckpointError: There are only damaged ones.
            NewerFormatError: The newest was written by a later release, which is no damage.
            BreakdownError: One cannot be read.
        """
        with read_errors_told(self.folder, way_out=MEND):
            steps = self.steps()
        for step in reversed([each for each in steps if before is None or each < before]):
            try:
                return self.read(step, check_hashes)
            except NewerFormatError:
                raise
            except CheckpointError as problem:
                self.warn_of(step, problem)
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of its {len(steps)} checkpoints is whole; bring back a copy, or begin "
                "anew in another output_dir"
            )
        return None

    @staticmethod
    def warn_of(step: int, problem: object) -> None:
        """Tell that a checkpoint is not used, and why."""
        logger.warning("checkpoint of step %d is damaged and left out: %s", step, problem)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            # It may lead to a disk that is not there.
            if self.folder.is_symlink():
                raise
            return []

    def _rank(self, manifest: Manifest) -> float | None:
        """The score, where it is of the metric that ranks."""
        return manifest.score if manifest.metric == self.retention.best_metric else None

    def _prune(self, newest: Checkpoint) -> None:
        """Remove what need not stay; damaged checkpoints are left to a person."""
        scores = {newest.manifest.step: self._rank(newest.manifest)}
        # The new checkpoint is complete, whatever happens to the others.
        try:
            steps = self.steps()
        except OSError as error:
            logger.warning("no checkpoint is removed: %s cannot be read (%s)", self.folder, error.strerror)
            return
        for step in steps:
            try:
                scores[step] = self._rank(self.read(step).manifest)
            except RunError as problem:
                logger.warning("checkpoint of step %d is left where it is: %s", step, problem)
        for step in scores.keys() - self.retention.kept(scores) - {newest.manifest.step}:
            try:
                _remove(self.path(step))
            except OSError as error:
                logger.warning("%s cannot be removed: %s", self.path(step), error)


def read_checkpoint(path: Path, check_hashes: bool = False) -> Checkpoint:
    """A checkpoint by its folder, which may have any name, checked as `CheckpointStore.read` does.

    Raises:
        CheckpointError: It is damaged; the text names file and fault.
        NewerFormatError: A later release wrote it.
    """
    manifest = _read_manifest(path)
    with read_errors_told(path):
        sizes = {name: (path / name).stat().st_size for name in _files(path)}
        for name, record in manifest.files.items():
            if name not in sizes:
                raise CheckpointError(f"{path / name}: is missing")
            if sizes[name] != record.size:
                raise CheckpointError(f"{path / name}: has {sizes[name]} bytes where {record.size} were written")
        for name in sizes.keys() - manifest.files.keys():
            raise CheckpointError(f"{path / name}: is in no manifest, so it was added later; remove it")
    if check_hashes:
        check_bytes(path, manifest.files)
    return Checkpoint(path, manifest)


def write_manifest(
    folder: Path,
    step: int,
    layout: Mapping[str, int],
    written: Mapping[str, FileRecord],
    score: float | None = None,
    metric: str = "",
) -> Manifest:
    """Make a folder a complete checkpoint, all of it on disk; under its final name it must be renamed afterwards.

    Args:
        folder: Where its other files are.
        step: Finished steps.
        layout: Sizes of the process grid; empty where no grid wrote it.
        written: See `CheckpointStore.commit`.
        score: The same.
        metric: What the score is of.

    Raises:
        CheckpointError: A file is missing or has other bytes than were written.
        OSError: The disk refuses.
    """
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    has_score = score is not None and math.isfinite(score)
    manifest = Manifest(
        step=step,
        layout=dict(layout),
        versions={"megatron-fipo": megatron_fipo.__version__, **versions},
        score=score if has_score else None,
        metric=metric if has_score else None,
        files=_sealed(folder, written),
    )
    write_json(folder / MANIFEST_FILE, _signed(manifest))
    return manifest


def _sealed(folder: Path, written: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Every file with its record, all of them on disk."""
    names = _files(folder)
    for name in written.keys() - names:
        raise CheckpointError(
            f"{folder / name}: was written by another rank and is not to be seen here; output_dir must be on a file "
            "system that all nodes share"
        )
    for name in names - written.keys():
        wait_for_disk(folder / name)
    records = {name: written[name] if name in written else hash_file(folder / name) for name in sorted(names)}
    for name, record in records.items():
        if (size := (folder / name).stat().st_size) != record.size:
            raise CheckpointError(f"{folder / name}: has {size} bytes where {record.size} were written")
    for each in (folder, *contents(folder)[1]):
        wait_for_disk(each)
    return records


def check_bytes(path: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare files of a checkpoint with what was written.

    Args:
        path: The checkpoint.
        files: From its manifest, all or some.

    Raises:
        CheckpointError: One has other bytes, or is missing.
        BreakdownError: One cannot be read.
    """
    with read_errors_told(path):
        for name, record in zip(files, hash_files([path / name for name in files]), strict=True):
            if record != files[name]:
                raise CheckpointError(f"{path / name}: other bytes than were written (SHA-256 differs)")


def _files(folder: Path) -> set[str]:
    """Every file but the manifest, by its path in the folder."""
    found = {path.relative_to(folder).as_posix() for path in contents(folder)[0]}
    return found - {MANIFEST_FILE}


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed on the way, it leaves none that looks complete."""
    doomed = path.with_name(f".{path.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _signed(manifest: Manifest) -> dict[str, Any]:
    content = asdict(manifest)
    return {"format_version": FORMAT_VERSION, "sha256": _digest(content), **content}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    with read_errors_told(path):
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: is missing; the folder is no checkpoint") from error
    try:
        content = json.loads(text)
        version = content.pop("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormatError(
                f"{path}: format version {version}, and this release reads {FORMAT_VERSION}; use the release "
                f"that wrote it ({content.get('versions', {}).get('megatron-fipo', 'a later one')}) or a later one"
            )
        if content.pop("sha256") != _digest(content):
            raise ValueError("its own SHA-256 differs")
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return Manifest(files=files, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
