"""Weights between CUDA devices: NCCL groups beside the default one, and handles to a device's memory."""

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.weight_sync.flat_buckets import fill_buffer, plan_buffer, view_tensor
from megatron_fipo.weight_sync.groups import host_store, join_group, leave_group

pytestmark = pytest.mark.gpu

TIMEOUT = timedelta(seconds=120)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(257, 129, generator=generator, dtype=torch.float32).bfloat16(),
        "scale": torch.randn(3, generator=generator, dtype=torch.float32),
    }


def broadcast(rank: int, folder: Path, port: int, results: Any) -> None:
    """Be the sender (rank 0) or the receiver (rank 1) of one bucket, each in a world of its own."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/world{rank}", rank=0, world_size=1)
    group = join_group(("127.0.0.1", port), "weights", rank, 2, "nccl", TIMEOUT)
    tensors = weights()
    places = plan_buffer(tensors)
    buffer = torch.empty(places[-1].end, dtype=torch.uint8, device=device)
    if rank == 0:
        fill_buffer(buffer, places, {name: tensor.to(device) for name, tensor in tensors.items()})
    dist.broadcast(buffer, group_src=0, group=group)
    results.put((rank, all(torch.equal(view_tensor(buffer, place).cpu(), tensors[place.name]) for place in places)))
    leave_group(group)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL refuses two ranks on one")
def test_a_bucket_crosses_an_nccl_group(tmp_path):
    context = multiprocessing.get_context("spawn")
    store, results = host_store("127.0.0.1", TIMEOUT), context.Queue()
    processes = [context.Process(target=broadcast, args=(rank, tmp_path, store.port, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=300) for _ in processes) == [(0, True), (1, True)]
    for process in processes:
        process.join()


def read_handle(handle: str, results: Any) -> None:
    """Read a bucket from another process's device memory, as a server does."""
    from sglang.srt.utils.common import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    bucket = MultiprocessingSerializer.deserialize(handle)
    expected = weights()
    results.put(
        all(
            torch.equal(
                bucket["flattened_tensor"][each.start_idx : each.end_idx].view(each.dtype).reshape(each.shape).cpu(),
                expected[each.name],
            )
            for each in bucket["metadata"]
        )
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_handle_opens_a_devices_memory_in_another_process():
    pytest.importorskip("sglang")
    from megatron_fipo.weight_sync.tensor import HandleFormat

    tensors = weights()
    places = plan_buffer(tensors)
    buffer = torch.empty(places[-1].end, dtype=torch.uint8, device="cuda")
    fill_buffer(buffer, places, tensors)
    torch.cuda.synchronize()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=read_handle, args=(HandleFormat().dump(buffer, places), results))
    process.start()
    assert results.get(timeout=300)
    process.join()
