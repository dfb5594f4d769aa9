"""Parts of different lengths through gloo: what megatron-core's functions give with the patch, and without it."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megatron_fipo.platform import cpu_shims
from tests.distributed_helpers import run_distributed

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA"),
]

SPLITS = [[3, 1], [0, 2], [0, 0]]


def rows(count: int, first: int) -> torch.Tensor:
    return torch.arange(first, first + 2 * count, dtype=torch.float32).reshape(count, 2)


def gather_and_scatter() -> list[list[torch.Tensor]]:
    """For every split: the gathered rows, the gradient of this rank's, and this rank's part of the sum."""
    cpu_shims.install()
    rank, results = dist.get_rank(), []
    for splits in SPLITS:
        mine = rows(splits[rank], 10 * rank).requires_grad_()
        whole = gather_from_sequence_parallel_region(mine, group=dist.group.WORLD, output_split_sizes=splits)
        (whole * (rank + 1)).sum().backward()
        total = reduce_scatter_to_sequence_parallel_region(
            whole.detach() * (rank + 1), group=dist.group.WORLD, input_split_sizes=splits
        )
        results.append([whole.detach(), mine.grad, total])
    return results


def test_parts_of_different_lengths() -> None:
    for rank, results in enumerate(run_distributed(gather_and_scatter, 2)):
        for splits, (whole, gradient, total) in zip(SPLITS, results, strict=True):
            parts = [rows(count, 10 * place) for place, count in enumerate(splits)]
            assert torch.equal(whole, torch.cat(parts)), splits
            assert torch.equal(gradient, torch.full_like(parts[rank], 3.0)), splits
            assert torch.equal(total, 3 * parts[rank]), splits


def gather_unpatched() -> str:
    parts = [torch.zeros(3, 2), torch.zeros(1, 2)]
    with pytest.raises(RuntimeError, match="invalid tensor size"):
        dist.all_gather(parts, torch.zeros_like(parts[dist.get_rank()]))
    return "refused"


def test_gloo_still_needs_the_patch() -> None:
    assert set(run_distributed(gather_unpatched, 2)) == {"refused"}
