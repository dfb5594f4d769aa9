"""Quantiles over ranks against NumPy's order statistics of all values together, bit for bit."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.metrics.quantiles import distributed_quantiles
from megatron_fipo.types import Distribution
from tests.distributed_helpers import run_distributed

LEVELS = (1, 10, 250, 500, 750, 995, 999, 1000)
WORLD = 4

# Infinities, both zeros and subnormal numbers included.
numbers = st.floats(width=32, allow_nan=False)
entries = st.tuples(numbers, st.integers(0, WORLD - 1), st.booleans())
populations = st.lists(st.lists(entries, max_size=30), min_size=1, max_size=3)


def part(entries: list, rank: int) -> Distribution:
    """A rank's values in two micro-batches; those that do not count are among them."""
    mine = [(value, counts) for value, owner, counts in entries if owner == rank]
    values, mask = torch.tensor([each[0] for each in mine]), torch.tensor([each[1] for each in mine], dtype=torch.bool)
    halves = [Distribution.of(values[cut], mask[cut], LEVELS) for cut in (slice(3), slice(3, None))]
    return halves[0].merge(halves[1])


def bits(values: np.ndarray) -> list[int]:
    return (values.astype(np.float32) + np.float32(0)).view(np.int32).tolist()


# Every rank must draw the same examples.
@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(populations)
def quantiles_of_random_splits(drawn: list) -> None:
    found = distributed_quantiles([part(each, dist.get_rank()) for each in drawn], dist.group.WORLD)
    for each, (quantiles, count) in zip(drawn, found, strict=True):
        ordered = np.sort(np.array([value for value, _, counts in each if counts], dtype=np.float32))
        assert int(count) == ordered.size
        if ordered.size:
            places = [math.ceil(level * ordered.size / 1000) - 1 for level in LEVELS]
            assert bits(quantiles.numpy()) == bits(ordered[places])


def one_split_like_another() -> list[bytes]:
    """The same values, first on one rank alone and then shared unevenly."""
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    rank, everything = dist.get_rank(), torch.ones(10_000, dtype=torch.bool)
    owners = torch.arange(10_000) ** 2 % 7 % WORLD
    results = []
    for mine in (everything if rank == 2 else ~everything, owners == rank):
        found = distributed_quantiles([Distribution.of(values, mine, LEVELS)], dist.group.WORLD)
        results.append(found[0][0].numpy().tobytes())
    numpy_says = np.quantile(values.numpy(), [level / 1000 for level in LEVELS], method="inverted_cdf")
    return [*results, numpy_says.astype(np.float32).tobytes()]


def on_a_rank() -> list[bytes]:
    quantiles_of_random_splits()
    return one_split_like_another()


@pytest.mark.distributed
def test_quantiles_over_ranks_are_those_of_all_values_together() -> None:
    for alone, shared, numpy_says in run_distributed(on_a_rank, WORLD):
        assert alone == shared == numpy_says
