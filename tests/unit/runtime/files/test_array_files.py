import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.runtime.files.array_files import ArrayFileError, read_arrays


def test_arrays_come_back(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=np.arange(3), none=np.zeros((0, 2), dtype=np.float32))
    arrays = read_arrays(tmp_path / "a.npz")
    assert arrays.keys() == {"one", "none"}
    assert arrays["one"].tolist() == [0, 1, 2]
    assert (arrays["none"].shape, arrays["none"].dtype) == ((0, 2), np.float32)


def test_what_is_no_file_of_plain_arrays_has_one_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", one=np.arange(100))
    whole = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "other.npz"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ArrayFileError):
            read_arrays(path)
    np.save(path.with_suffix(".npy"), np.arange(3))
    np.savez(path, one=np.array([object()]))
    for each in (path.with_suffix(".npy"), path):
        with pytest.raises(ArrayFileError):
            read_arrays(each)
    # The table is said to begin a byte later, so that the first array begins before the file.
    start = int.from_bytes(whole[-6:-2], "little")
    path.write_bytes(whole[:-6] + (start + 1).to_bytes(4, "little") + whole[-2:])
    with pytest.raises(ArrayFileError, match="Invalid argument"):
        read_arrays(path)


@pytest.mark.parametrize("count", [10**15, 10**30])
def test_a_header_that_asks_for_more_than_there_is_is_damage(count: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=np.arange(100))
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        array = file.read("one.npy")
    told = f"'shape': ({count},), }}".encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("one.npy", array.replace(b"'shape': (100,), }" + b" " * (len(told) - 18), told))
    with pytest.raises(ArrayFileError):
        read_arrays(tmp_path / "a.npz")


@contextmanager
def memory_to_spare(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_cannot_be_read_now_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError):
        read_arrays(path)
    with pytest.raises(IsADirectoryError):
        read_arrays(tmp_path)
    # A real error of reading: nothing is mapped where it begins.
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        read_arrays(path)
    path.unlink()
    np.savez(path, one=np.zeros(2**26, dtype=np.uint8))
    with memory_to_spare(2**24), pytest.raises(MemoryError):
        read_arrays(path)
    assert read_arrays(path)["one"].size == 2**26
