"""safetensors files that are written and read tensor by tensor are those of the library."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion import safetensors_file
from megatron_fipo.conversion.safetensors_file import (
    PlannedTensor,
    SafetensorsWriter,
    TensorRecord,
    fault_of,
    record_of,
    stored_tensors,
)

TENSORS = {
    "odd": torch.randn(7, 3, dtype=torch.float64).to(torch.bfloat16),
    "vector": torch.randn(5),
    "empty": torch.empty(0, 4),
    "single": torch.tensor(2.5),
    "half": torch.randn(2, 2, 2).half(),
    "special": torch.tensor([float("nan"), -0.0, float("inf")]),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def planned(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> list[PlannedTensor]:
    return [PlannedTensor(name, tuple(each.shape), dtype or each.dtype) for name, each in tensors.items()]


def write(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, TensorRecord]:
    with SafetensorsWriter(path, planned(tensors, dtype)) as file:
        # In any order.
        return {name: file.write(name, tensors[name]) for name in sorted(tensors)}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "file", TENSORS)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert torch.equal(bits(found[name]), bits(tensor))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    stored = {each.name: each for each in stored_tensors(tmp_path / "file")}
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(bits(stored[name].read()), bits(tensor))
        assert stored[name].record() == record_of(tensor, tensor.dtype)


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5),
    block_bytes=st.sampled_from([8, 24, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25, deadline=None)
def test_records_are_those_of_the_file_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], block_bytes: int, dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("cut") / "file"
    # Of which some are no rows of their own.
    tensors = {str(number): torch.randn(*shape, 2)[..., 0] for number, shape in enumerate(shapes)}
    whole = safetensors_file._BLOCK_BYTES
    safetensors_file._BLOCK_BYTES = block_bytes
    try:
        records = write(path, tensors, dtype)
        for stored in stored_tensors(path):
            assert stored.record() == records[stored.name] == record_of(tensors[stored.name], dtype)
            expected = torch.empty(stored.shape, dtype=dtype).copy_(tensors[stored.name])
            assert torch.equal(bits(stored.read()), bits(expected))
    finally:
        safetensors_file._BLOCK_BYTES = whole


def test_a_changed_byte_is_another_record(tmp_path: Path) -> None:
    records = write(tmp_path / "file", TENSORS)
    stored = next(each for each in stored_tensors(tmp_path / "file") if each.name == "vector")
    content = bytearray((tmp_path / "file").read_bytes())
    content[stored.start + 3] ^= 1
    (tmp_path / "file").write_bytes(content)
    for each in stored_tensors(tmp_path / "file"):
        assert fault_of(each.record(), records[each.name]) == ("other bytes" if each.name == "vector" else "")


def test_shapes_and_types_are_told() -> None:
    one = record_of(torch.zeros(4), torch.float32)
    assert fault_of(one, record_of(torch.zeros(2, 2), torch.float32)) == "shape [4], not [2, 2]"
    assert fault_of(one, record_of(torch.zeros(4), torch.bfloat16)) == "type F32, not BF16"


def test_a_tensor_that_was_forgotten_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="1 tensors were not written"):
        with SafetensorsWriter(tmp_path / "file", planned({"a": torch.ones(2), "b": torch.ones(2)})) as file:
            file.write("a", torch.ones(2))


def test_types_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    save_file({"eight": torch.ones(4, dtype=torch.int8)}, tmp_path / "file")
    (stored,) = stored_tensors(tmp_path / "file")
    with pytest.raises(ConfigError, match="eight = I8: is no type of weights that can be converted"):
        stored.read()
