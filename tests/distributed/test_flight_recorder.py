"""What the flight recorder of this PyTorch tells about gloo; on NCCL it has never run here."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.parallel.flight_recorder import last_collectives, record_collectives
from tests.distributed_helpers import run_distributed

pytestmark = pytest.mark.distributed


def told_once_over(num_over: int) -> list[dict[str, Any]]:
    """What is told once so many groups' calls are over, which the recorder learns a moment later."""
    deadline = time.monotonic() + 10.0
    told = last_collectives()
    while sum(each["is_over"] for each in told) < num_over and time.monotonic() < deadline:
        time.sleep(0.01)
        told = last_collectives()
    return told


def collect() -> list[dict[str, Any]]:
    group = dist.new_group([0, 1])
    for _ in range(3):
        dist.all_reduce(torch.ones(4))
    dist.broadcast(torch.ones(2, 3), 0, group=group)
    if dist.get_rank() == 0:
        waiting = dist.all_reduce(torch.ones(5), async_op=True)
        told = told_once_over(1)
        dist.barrier(group)
        waiting.wait()
    else:
        told = told_once_over(2)
        dist.barrier(group)
        dist.all_reduce(torch.ones(5))
    return told


def test_the_last_call_of_every_group_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    record_collectives()
    main, other = run_distributed(collect, 2)
    in_group = {"what": "gloo:broadcast", "number": 1, "sizes": [[2, 3]], "is_over": True}
    assert not any(each.pop("is_p2p") for each in (*main, *other))
    assert [each.pop("group").split()[0] for each in (*main, *other)] == ["0", "1", "0", "1"]
    assert main == [{"what": "gloo:all_reduce", "number": 4, "sizes": [[5]], "is_over": False}, in_group]
    assert other == [{"what": "gloo:all_reduce", "number": 3, "sizes": [[4]], "is_over": True}, in_group]
