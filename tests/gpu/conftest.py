"""What tests on a CUDA device share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank, over gloo and NCCL."""
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
