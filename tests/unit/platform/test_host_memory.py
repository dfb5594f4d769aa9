import pytest
import torch

from megatron_fipo.platform.host_memory import HostMemory, empty, refill, require_resident, storages_of
from megatron_fipo.runtime.errors import RunError

CHUNK = 64


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def some_tensors() -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and sizes, some of them views of one storage; chunks end inside them."""
    flat = torch.randn(40, dtype=torch.float64)
    return {
        "whole": torch.randn(5, 7),
        "first": flat[:16].view(4, 4),
        "last": flat[16:],
        "half": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0),
    }


def test_views_hold_what_they_held():
    tensors = some_tensors()
    before = {name: bits(tensor).clone() for name, tensor in tensors.items()}
    host = HostMemory(CHUNK)
    storages = storages_of(tensors.values())
    freed = host.take(storages)
    assert freed == 5 * 7 * 4 + 40 * 8 + 3 * 2 + 3
    assert all(storage.nbytes() == 0 for storage in storages)
    assert host.in_use
    assert host.give_back() == freed
    assert not host.in_use
    for name, tensor in tensors.items():
        assert torch.equal(bits(tensor), before[name]), name
    tensors["first"].fill_(1.0)
    assert not torch.equal(bits(tensors["first"]), before["first"])
    assert torch.equal(bits(tensors["last"]), before["last"])


def test_host_memory_is_allocated_once():
    host = HostMemory(CHUNK)
    tensors = [torch.randn(33), torch.randn(4)]
    host.take(storages_of(tensors))
    host.give_back()
    places = [chunk.data_ptr() for chunk in host._chunks]
    assert host.num_bytes == 33 * 4 + 4 * 4
    for _ in range(3):
        host.take(storages_of(tensors))
        host.give_back()
        assert [chunk.data_ptr() for chunk in host._chunks] == places


def test_host_memory_grows_with_what_it_has_to_hold():
    host = HostMemory(CHUNK)
    tensors = [torch.randn(17)]
    for count in range(4):
        before = [tensor.clone() for tensor in tensors]
        host.take(storages_of(tensors))
        host.give_back()
        assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
        assert host.num_bytes == 17 * 4 * (count + 1)
        tensors.append(torch.randn(17))


def test_giving_back_nothing_does_nothing():
    assert HostMemory(CHUNK).give_back() == 0


def test_an_empty_storage_is_no_tensor_to_use():
    tensors = some_tensors()
    require_resident(tensors.values(), "the tensors")
    empty(storages_of([tensors["first"]]))
    with pytest.raises(RunError, match=r"the tensors are not on the device: .*ActorMemory\.restore"):
        require_resident(tensors.values(), "the tensors")
    require_resident([tensors["whole"], tensors["nothing"]], "the tensors")


class FullDevice:
    """A storage on a device without memory for it."""

    size = 0

    def resize_(self, size: int) -> None:
        if size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.size = size


def test_what_finds_no_memory_stays_empty():
    storage = torch.randn(256).untyped_storage()
    storage.resize_(0)
    with pytest.raises(RunError, match=r"needs 1\.00 GiB of GPU memory back, .*CUDA out of memory"):
        refill([(storage, 1024), (FullDevice(), 2**30 - 1024)])
    assert storage.nbytes() == 0
    refill([(storage, 1024)])
    assert storage.nbytes() == 1024
