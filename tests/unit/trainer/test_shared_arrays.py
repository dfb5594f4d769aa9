import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.trainer.shared_arrays import map_arrays, share_arrays

ARRAYS = {
    "empty": np.zeros((0, 3), dtype=np.float32),
    "mask": np.array([True, False, True]),
    "matrix": np.arange(12, dtype=np.int16).reshape(3, 4),
    "numbers": np.linspace(0.0, 1.0, 1001),
}


def through_json(layout: object) -> list[list[object]]:
    return json.loads(json.dumps(layout))


@pytest.mark.parametrize("names", [list(ARRAYS), ["empty"], []])
def test_arrays_come_out_as_they_went_in(names: list[str]) -> None:
    descriptor, layout = share_arrays({name: ARRAYS[name] for name in names})
    mapped = map_arrays(descriptor, through_json(layout))
    assert list(mapped) == names
    for name, array in mapped.items():
        assert (array.dtype, array.shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_the_memory_has_no_name_and_goes_with_its_arrays() -> None:
    before = set(os.listdir("/dev/shm"))
    descriptor, layout = share_arrays(ARRAYS)
    inode = os.fstat(descriptor).st_ino
    mapped = map_arrays(descriptor, layout)
    assert set(os.listdir("/dev/shm")) <= before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert f" {inode} " in Path("/proc/self/maps").read_text()
    del mapped
    assert f" {inode} " not in Path("/proc/self/maps").read_text()


def test_writing_to_mapped_arrays_stays_here() -> None:
    descriptor, layout = share_arrays(ARRAYS)
    mine, theirs = map_arrays(os.dup(descriptor), layout), map_arrays(descriptor, layout)
    mine["matrix"][0, 0] = 99
    assert theirs["matrix"][0, 0] == 0
