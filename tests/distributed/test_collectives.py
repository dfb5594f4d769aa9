"""Values and arrays between two ranks."""

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_fipo.parallel.collectives import (
    broadcast_arrays,
    broadcast_json,
    gather_json,
    receive_arrays,
    send_arrays,
)
from tests.distributed_helpers import run_distributed

pytestmark = pytest.mark.distributed

VALUES: list[Any] = [None, True, 3, -0.5, "ΣA·f", [], {"a": [1, None], "b": {"c": "d"}}, list(range(5000))]

ARRAYS = {
    "int32": np.array([[1, -2, 3], [4, 5, 6]], dtype=np.int32),
    "int64": np.array([2**40], dtype=np.int64),
    "float32": np.array([1.5, -np.inf], dtype=np.float32),
    "float64": np.array(0.1),
    "bool": np.array([True, False, True]),
    "uint8": np.arange(256, dtype=np.uint8),
    "empty": np.empty(0, dtype=np.float32),
    "empty rows": np.empty((0, 7), dtype=np.int64),
    "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "every second": np.arange(10, dtype=np.int64)[::2],
}


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert np.array_equal(actual[name], array), name


def exchange() -> dict[str, Any]:
    rank = dist.get_rank()
    # All ranks take part in making every group, also those that are not in it.
    alone = [dist.new_group([member]) for member in range(2)]
    results: dict[str, Any] = {
        "broadcast": [broadcast_json(value if rank == 1 else "never read", 1) for value in VALUES],
        "nan": broadcast_json(float("nan") if rank == 0 else None, 0),
        "gather": gather_json({"rank": rank, "text": "x" * 1000 * rank}),
        "alone": gather_json(rank, alone[rank]) + [broadcast_json(rank, rank, alone[rank])],
    }
    results["arrays"] = broadcast_arrays(ARRAYS if rank == 1 else None, 1)
    results["no arrays"] = broadcast_arrays({} if rank == 0 else None, 0)
    if rank == 0:
        send_arrays(ARRAYS, 1)
        send_arrays({}, 1)
        results["received"] = [receive_arrays(1)]
    else:
        results["received"] = [receive_arrays(0), receive_arrays(0)]
        send_arrays({"back": np.array([7.0])}, 0)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(exchange, 2)


def test_every_rank_gets_the_value_of_one(ranks):
    for results in ranks:
        assert results["broadcast"] == VALUES
        assert np.isnan(results["nan"])


def test_every_rank_gets_the_values_of_all(ranks):
    expected = [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 1000}]
    for results in ranks:
        assert results["gather"] == expected


def test_a_group_keeps_to_itself(ranks):
    assert [results["alone"] for results in ranks] == [[0, 0], [1, 1]]


def test_arrays_arrive_with_type_and_shape(ranks):
    for results in ranks:
        assert_equal(results["arrays"], ARRAYS)
        assert results["no arrays"] == {}
    assert_equal(ranks[1]["received"][0], ARRAYS)
    assert ranks[1]["received"][1] == {}
    assert_equal(ranks[0]["received"][0], {"back": np.array([7.0])})
