"""One private Slurm for all tests that need one."""

from collections.abc import Iterator

import pytest

from tests.cluster.mini_slurm import MiniSlurm, mini_slurm, why_unavailable


@pytest.fixture(scope="session")
def slurm() -> Iterator[MiniSlurm]:
    """Two nodes of two GPUs each. Skips where Slurm is not installed; one that does not start is a failure."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with mini_slurm() as running:
        yield running
