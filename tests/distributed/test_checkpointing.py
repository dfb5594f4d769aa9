"""A run's checkpoints on several ranks: what is written, what a failure leaves, and what is found again."""

import json
import logging
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.runtime.checkpoint_store import CheckpointStore
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.files.hashed_file import HashedFile
from megatron_fipo.runtime.logging import own_logger
from megatron_fipo.trainer.checkpointing import Checkpointer
from tests.distributed_helpers import run_distributed
from tests.invariance.grid import Combination
from tests.invariance.updates import write_models
from tests.trainees import Trainee, trainee

pytestmark = pytest.mark.distributed

GRID = replace(Combination(), data=2, distributed_optimizer=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpointing")
    write_models(root)
    return root


def checkpointer(each: Trainee, folder: Path, **fields: Any) -> Checkpointer:
    return Checkpointer(CheckpointConfig(every_steps=1, **fields), each.checkpoint.context, each.checkpoint, folder)


def save(own: Checkpointer, step: int) -> bool:
    def note(folder: Path) -> None:
        if dist.get_rank() == 0:
            (folder / "trainer.json").write_text(json.dumps({"step": step}))

    own.begin(step)
    return own.complete(step, note)


@contextmanager
def warnings_kept() -> Iterator[list[str]]:
    """Warnings of the package on this rank."""
    kept: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    own_logger().addHandler(handler)
    yield kept
    own_logger().removeHandler(handler)


def train_and_find_again(root: Path, folder: Path) -> list[Any]:
    """Three steps, of which the last checkpoint is then damaged."""
    states = {}
    with trainee(root, GRID) as each:
        own = checkpointer(each, folder)
        assert own.restore() is None
        for step, update in enumerate(each.updates, start=1):
            each.train_step.update(update)
            assert own.is_due(step)
            assert save(own, step)
            states[step] = each.state()
            own.advance()
        own.finish()
    found: list[Any] = []
    for damage in (False, True):
        if damage and dist.get_rank() == 0:
            flip_a_byte(folder / "step_3" / "actor" / "__1_0.distcp")
        dist.barrier()
        with trainee(root, GRID) as each, warnings_kept() as kept:
            checkpoint = checkpointer(each, folder).restore()
            told = None
            if checkpoint is not None:
                told = json.loads((checkpoint.path / "trainer.json").read_text())["step"]
            found.append((told, each.state() == states[2 if damage else 3], kept))
    names = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        flip_a_byte(folder / "step_2" / "actor" / "__0_0.distcp")
    dist.barrier()
    with trainee(root, GRID) as each, pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        checkpointer(each, folder).restore()
    return [found, names]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_valid_checkpoint_is_found_again(root: Path, tmp_path: Path) -> None:
    first, other = run_distributed(train_and_find_again, 2, root, tmp_path / "checkpoints")
    (whole, damaged), names = first
    assert whole == (3, True, []) and damaged[:2] == (2, True) and names == ["step_2", "step_3.set_aside"]
    warning, renamed = damaged[2]
    assert renamed.endswith("is now called step_3.set_aside, and stays until you remove it")
    assert warning.startswith("checkpoint of step 3 is damaged and left out") and "__1_0.distcp: other bytes" in warning
    assert other[0] == [(None, True, []), (None, True, [])]


def run_out_of_space(root: Path, folder: Path) -> list[Any]:
    """A file system that takes no more than a part of rank 1's file, and one that has no room from the start."""
    told: list[Any] = []
    with trainee(root, GRID) as each, warnings_kept() as kept:
        own = checkpointer(each, folder, asynchronous=False)
        each.train_step.update(each.updates[0])
        told.append(save(own, 1))
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        told.append(save(own, 2))
        strict = checkpointer(each, folder, on_failure="stop")
        save(strict, 2)
        with pytest.raises(CheckpointError, match="rank 1: .*step_2.partial/actor cannot be written: File too large"):
            strict.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        strict.store = CheckpointStore(folder, free_bytes=lambda path: 1000)
        with pytest.raises(CheckpointError, match="0 MiB are free and a checkpoint needs"):
            save(strict, 2)
        told.append(sorted(path.name for path in folder.iterdir()))
        dist.barrier()
        told.append(save(own, 3))
    return [told, kept]


def test_a_full_disk_leaves_what_was_complete(root: Path, tmp_path: Path) -> None:
    (told, (warning,)), other = run_distributed(run_out_of_space, 2, root, tmp_path / "checkpoints")
    assert told == [True, False, ["step_1"], True]
    assert warning.startswith("no checkpoint of step 2: rank 1: ")
    assert other == [told, []]
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [1, 3]


def die_while_writing(root: Path, folder: Path) -> None:
    write = HashedFile.write

    def killed(file: HashedFile, data: bytes) -> int:
        if dist.get_rank() == 1 and file.size > 100_000:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    with trainee(root, GRID) as each:
        own = checkpointer(each, folder)
        each.train_step.update(each.updates[0])
        save(own, 1)
        own.finish()
        HashedFile.write = killed  # type: ignore[method-assign, assignment]
        save(own, 2)
        own.finish()


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(AssertionError, match="rank 1: died without a result"):
        run_distributed(die_while_writing, 2, root, folder)
    assert sorted(path.name for path in folder.iterdir()) == [".step_2.partial", "step_1"]
    store = CheckpointStore(folder)
    with caplog.at_level(logging.WARNING):
        found = store.newest_valid()
    assert found is not None and found.manifest.step == 1 and not caplog.records
    assert store.clean() == [".step_2.partial"]
    assert [path.name for path in folder.iterdir()] == ["step_1"]
