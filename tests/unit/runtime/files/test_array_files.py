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
    for each in (path.with_suffix(".npy"), path, tmp_path / "missing.npz", tmp_path):
        with pytest.raises(ArrayFileError):
            read_arrays(each)
