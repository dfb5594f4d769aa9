"""Trainer and servers hand their devices' memory to each other in the one order that never needs more than there is."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch.distributed as dist

from megatron_fipo.parallel.agreement import on_every_rank
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.colocation import Colocation, Failed
from tests.distributed_helpers import run_distributed

pytestmark = pytest.mark.distributed

SERVERS = tuple(
    ServerAddress(name=name, url=f"http://127.0.0.1:{port}", tensor_parallel_size=1, policy_version=0)
    for name, port in (("a", 1), ("b", 2))
)
GIB = 1024**3


class Record:
    """Stands in for a rank's memory, the servers' memory and the transport, and notes what is asked of them.

    Args:
        faults: By action: what it raises, or for servers which of them fail and why.
    """

    def __init__(self, faults: dict[str, Any]) -> None:
        self.events: list[str] = []
        self.faults = faults

    def offload_optimizer(self) -> None:
        self._note("optimizer away")

    def offload_parameters(self) -> None:
        self._note("parameters away")

    def restore_parameters(self) -> None:
        self._note("parameters back")

    def restore(self) -> None:
        self._note("all back")

    def drain(self) -> int:
        return 3 * GIB

    def resume(self, tag: str, servers: Sequence[ServerAddress]) -> Failed:
        return self._ask(f"resume {tag}", servers)

    def release(self, tag: str, servers: Sequence[ServerAddress]) -> Failed:
        return self._ask(f"release {tag}", servers)

    def push(self, servers: Sequence[ServerAddress]) -> Failed:
        return on_every_rank(lambda: self._ask("push", servers))

    def _ask(self, action: str, servers: Sequence[ServerAddress]) -> Failed:
        names = [server.name for server in servers]
        self._note(" ".join([action, *names]))
        return {name: why for name, why in self.faults.get(action, {}).items() if name in names}

    def _note(self, event: str) -> None:
        self.events.append(event)
        fault = self.faults.get(event)
        if fault is not None and dist.get_rank() == 1:
            raise RunError(fault)


type Outcome = tuple[Any, list[str]]


def begin(colocation: Colocation, record: Record) -> dict[str, str]:
    return colocation.to_servers(SERVERS, record.push)


def turn(colocation: Colocation, record: Record) -> dict[str, str]:
    failed = begin(colocation, record)
    colocation.to_trainer(SERVERS)
    return failed


def push_again(colocation: Colocation, record: Record) -> dict[str, str]:
    return colocation.push_again(SERVERS[1:], record.push)


def end(colocation: Colocation, record: Record) -> None:
    colocation.to_trainer(SERVERS)


def start(colocation: Colocation, record: Record) -> None:
    colocation.vacate()
    colocation.to_trainer(SERVERS)


def metrics(colocation: Colocation, record: Record) -> tuple[bool, bool]:
    turn(colocation, record)
    first, second = colocation.drain(), colocation.drain()
    assert set(first) == {"perf/offload_gib", "perf/offload_s"}
    return first["perf/offload_gib"] == 3.0, first["perf/offload_s"] > second["perf/offload_s"] == 0.0


Case = tuple[Callable[[Colocation, Record], Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "turn": (turn, {}),
    "start": (start, {}),
    "push again": (push_again, {}),
    "no memory for weights": (begin, {"resume weights": {"a": "500"}}),
    "weights not taken in": (begin, {"push": {"b": "timeout"}}),
    "no memory for the KV cache": (begin, {"resume kv_cache": {"b": "500"}}),
    "push raises": (begin, {"push a b": "rank 1 has no weights"}),
    "push raises, a server is stuck": (
        begin,
        {"push a b": "rank 1 has no weights", "release weights": {"b": "no answer"}},
    ),
    "not released": (end, {"release kv_cache": {"b": "no answer"}}),
    "not released, no memory": (end, {"release weights": {"b": "no answer"}, "all back": "rank 1 needs 2 GiB"}),
    "metrics": (metrics, {}),
}


def play() -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for name, (action, faults) in CASES.items():
        record = Record(faults)
        colocation = Colocation(record, record if dist.get_rank() == 0 else None)
        try:
            result = action(colocation, record)
        except RunError as error:
            result = str(error)
        outcomes[name] = (result, record.events)
    return outcomes


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Outcome]]:
    return run_distributed(play, 2)


def test_the_order_of_a_turn(ranks):
    failed, events = ranks[0]["turn"]
    assert failed == {}
    assert events == [
        "optimizer away",
        "resume weights a b",
        "push a b",
        "parameters away",
        "resume kv_cache a b",
        "release kv_cache a b",
        "release weights a b",
        "all back",
    ]
    assert ranks[1]["turn"] == ({}, ["optimizer away", "push a b", "parameters away", "all back"])


def test_servers_start_on_devices_that_are_free(ranks):
    released = ["release kv_cache a b", "release weights a b"]
    assert ranks[0]["start"][1] == ["optimizer away", "parameters away", *released, "all back"]


def test_a_restarted_server_gets_the_weights_within_the_turn(ranks):
    for outcomes in ranks:
        assert outcomes["push again"] == ({}, ["parameters back", "push b", "parameters away"])


@pytest.mark.parametrize(
    ("case", "failed", "pushed", "has_cache"),
    [
        ("no memory for weights", {"a": "500"}, "b", "b"),
        ("weights not taken in", {"b": "timeout"}, "a b", "a"),
        ("no memory for the KV cache", {"b": "500"}, "a b", "a b"),
    ],
)
def test_a_server_that_cannot_begin_is_left_out(ranks, case, failed, pushed, has_cache):
    for outcomes in ranks:
        assert outcomes[case][0] == failed
        assert f"push {pushed}" in outcomes[case][1]
    assert ranks[0][case][1][-1] == f"resume kv_cache {has_cache}"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("push raises", "rank 1 has no weights"),
        (
            "push raises, a server is stuck",
            "rank 1 has no weights. Besides, server b does not give GPU memory back to the trainer: no answer. ",
        ),
    ],
)
def test_the_trainer_is_whole_after_a_failed_hand_over(ranks, case, message):
    for number, outcomes in enumerate(ranks):
        error, events = outcomes[case]
        assert error.startswith(message)
        released = ["release kv_cache a b", "release weights a b"] if number == 0 else []
        assert events[events.index("push a b") + 1 :] == [*released, "all back"]
        assert "parameters away" not in events


@pytest.mark.parametrize("case", ["not released", "not released, no memory"])
def test_a_server_that_keeps_memory_is_named(ranks, case):
    for outcomes in ranks:
        error, events = outcomes[case]
        assert error.startswith("server b does not give GPU memory back to the trainer: no answer. ")
        assert events[-1] == "all back"
        assert ("rank 1 needs 2 GiB" in error) == (case == "not released, no memory")


def test_bytes_and_seconds_are_told_once(ranks):
    for outcomes in ranks:
        assert outcomes["metrics"][0] == (True, True)
