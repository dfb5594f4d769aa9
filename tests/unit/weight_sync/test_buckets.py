from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_fipo.rollout.engine import WeightBucket
from megatron_fipo.weight_sync.base import buckets


def stream(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    """Tensors of so many bytes, named in order."""
    width = torch.empty(0, dtype=dtype).element_size()
    return [(f"w{place}", torch.full((size // width,), place, dtype=dtype)) for place, size in enumerate(sizes)]


def shape_of(found: list[WeightBucket]) -> list[tuple[list[str], bool]]:
    return [(list(bucket.tensors), bucket.is_last) for bucket in found]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([40], [(["w0"], True)]),
        ([40, 60], [(["w0", "w1"], True)]),
        ([40, 64], [(["w0"], False), (["w1"], True)]),
        ([100, 100], [(["w0"], False), (["w1"], True)]),
        ([40, 40, 40, 40, 40], [(["w0", "w1"], False), (["w2", "w3"], False), (["w4"], True)]),
        # A tensor above the limit has a bucket of its own, wherever it stands.
        ([400, 20, 20], [(["w0"], False), (["w1", "w2"], True)]),
        ([20, 400, 20], [(["w0"], False), (["w1"], False), (["w2"], True)]),
        ([20, 400], [(["w0"], False), (["w1"], True)]),
        # Nothing to send still ends the version.
        ([], [([], True)]),
        ([0, 100, 0], [(["w0", "w1", "w2"], True)]),
    ],
)
def test_buckets_hold_at_most_the_limit(sizes: list[int], expected: list[tuple[list[str], bool]]) -> None:
    assert shape_of(list(buckets(stream(*sizes), 100, policy_version=3))) == expected


def test_tensors_and_version_go_through_unchanged() -> None:
    sent = stream(40, 80, 40)
    found = list(buckets(sent, 100, policy_version=7))
    assert {bucket.policy_version for bucket in found} == {7}
    received = {name: tensor for bucket in found for name, tensor in bucket.tensors.items()}
    assert list(received) == [name for name, _ in sent]
    assert all(received[name] is tensor for name, tensor in sent)


def test_size_is_in_bytes_of_the_tensors_own_type() -> None:
    assert shape_of(list(buckets(stream(60, 60, dtype=torch.bfloat16), 100, 0))) == [(["w0"], False), (["w1"], True)]


def test_tensors_are_drawn_from_the_stream_as_they_are_needed() -> None:
    drawn: list[str] = []

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream(60, 60, 60):
            drawn.append(name)
            yield name, tensor

    found = buckets(counted(), 100, 0)
    next(found)
    assert drawn == ["w0", "w1"], "a bucket goes out as soon as the next tensor does not fit"
