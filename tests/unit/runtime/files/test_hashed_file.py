import hashlib
import io
import resource
from pathlib import Path

import pytest
import torch

from megatron_fipo.runtime.files.hashed_file import FileRecord, HashedFile, hash_file, hash_files


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    tensor, plain = torch.arange(300_000), io.BytesIO()
    torch.save(tensor, plain)
    with HashedFile(tmp_path / "a") as file:
        file.write(b"first")
        torch.save(tensor, file)  # type: ignore[arg-type]
    content = (tmp_path / "a").read_bytes()
    assert content == b"first" + plain.getvalue()
    assert file.record == FileRecord(len(content), hashlib.sha256(content).hexdigest()) == hash_file(tmp_path / "a")
    assert hash_files([tmp_path / "a"] * 3) == [file.record] * 3


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError), HashedFile(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_bytes() == b"old"


def test_the_disks_own_error_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        # PyTorch would tell of an unexpected position in its archive.
        with pytest.raises(OSError, match="File too large"), HashedFile(tmp_path / "a") as file:
            torch.save(torch.zeros(2**20), file)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="File too large"), HashedFile(tmp_path / "b") as file:
            file.write(bytes(100_001))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
