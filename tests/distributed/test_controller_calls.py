"""Ranks that wait together for a controller process, here one that generates nothing."""

import io
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from megatron_fipo.config.base import ConfigError
from megatron_fipo.display.live_view import LiveView
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.runtime.stop_request import StopRequest, StopRequested
from megatron_fipo.trainer import controller_calls
from megatron_fipo.trainer.controller_calls import ControllerCalls
from megatron_fipo.trainer.controller_link import ControllerLink
from tests.distributed_helpers import run_distributed
from tests.stand_in_controller import ERRORS, SERVER

pytestmark = pytest.mark.distributed

STAND_IN = "tests.stand_in_controller"
WORD_EVERY_S = 0.1


class Notes(Progress):
    def __init__(self) -> None:
        self.noted: list[tuple[Any, ...]] = []

    def advance(self, done: int, total: int) -> None:
        self.noted.append((done, total))

    def show_response(self, prompt: str, response: str, reward: float) -> None:
        self.noted.append((prompt, response, reward))


def outcome(calls: ControllerCalls, action: str, **arguments: Any) -> tuple[str, str]:
    try:
        return "value", str(calls.ask(action, arguments))
    except (ConfigError, RunError) as error:
        return type(error).__name__, str(error)


def converse() -> dict[str, Any]:
    is_main = dist.get_rank() == 0
    link = ControllerLink(STAND_IN) if is_main else None
    notes, words = Notes(), []
    calls = ControllerCalls(link, notes, WORD_EVERY_S)
    broadcast = controller_calls.broadcast_json

    def listen(value: Any, src: int) -> Any:
        words.append(broadcast(value, src))
        return words[-1]

    def push(servers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        # A collective, as sending weights is; it has its own view of which servers they are.
        (name,) = broadcast([each["name"] for each in servers], 1)
        return {name: "out of reach"}

    controller_calls.broadcast_json = listen
    seen: dict[str, Any] = {"echo": calls.ask("echo", {"a": [1, None]})}
    value, arrays = calls.ask("count", {"size": 100_000})
    seen["count"] = (value, {name: (array.dtype.str, array.shape) for name, array in arrays.items()})
    seen["last number"] = int(arrays["numbers"][-1]) if is_main else None
    words.clear()
    calls.ask("take_time", {"seconds": 5 * WORD_EVERY_S})
    seen["words"], seen["notes"] = [word for word, _ in words], notes.noted
    seen["errors"] = {kind: outcome(calls, "fail", kind=kind) for kind in ERRORS}
    seen["declined"] = calls.ask("ask_for_weights", {})
    words.clear()
    seen["pushed"] = calls.ask("ask_for_weights", {}, push)
    seen["push words"] = [word for word, _ in words]
    seen["died"] = outcome(calls, "die")
    seen["after its death"] = outcome(calls, "echo")
    if link is not None:
        link.close()
    return seen


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_distributed(converse, 2)


def test_an_answer_and_its_arrays_reach_rank_0(seen: list[dict[str, Any]]) -> None:
    assert [each["echo"] for each in seen] == [({"a": [1, None]}, {}), (None, {})]
    assert seen[0]["count"] == ("counted", {"numbers": ("<i4", (100_000,)), "none": ("<f8", (0, 2))})
    assert seen[0]["last number"] == 99_999
    assert seen[1]["count"] == (None, {})


def test_the_other_ranks_hear_that_rank_0_still_waits(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert each["words"][-1] == "done"
        assert each["words"].count("wait") == len(each["words"]) - 1 >= 2
    assert seen[0]["notes"] == [(1, 2), ("1+1=", "2", 1.0)]


@pytest.mark.parametrize("rank", [0, 1])
def test_errors_of_the_controller_reach_every_rank(rank: int, seen: list[dict[str, Any]]) -> None:
    found = seen[rank]["errors"]
    for kind in ("config", "end", "run"):
        assert found[kind] == (type(ERRORS[kind]).__name__, str(ERRORS[kind]))
    assert found["defect"] == ("RunError", "the rollout controller failed, see above: ZeroDivisionError: by zero")


def test_all_ranks_send_weights_to_a_server_that_came_back(seen: list[dict[str, Any]]) -> None:
    assert [each["pushed"][0] for each in seen] == [{SERVER["name"]: "out of reach"}, None]
    assert [each["push words"][0] for each in seen] == ["push", "push"]


def test_nothing_is_sent_while_newer_weights_are_about_to_be(seen: list[dict[str, Any]]) -> None:
    assert [each["declined"] for each in seen] == [(None, {}), (None, {})]


def test_a_controller_that_is_killed_ends_the_run_on_every_rank(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        for moment in ("died", "after its death"):
            kind, text = each[moment]
            assert kind == "ControllerEndedError"
            assert text.endswith("was killed by signal 9; its messages, if any, are above")


def test_what_the_controller_says_is_on_the_live_view(tmp_path: Path) -> None:
    terminal = io.StringIO()
    with closing(ControllerLink(STAND_IN)) as link, LiveView(Console(file=terminal, force_terminal=True)) as view:
        view.begin_run(tmp_path, 1)
        link.send({"request": 1, "do": "say", "with": {"text": "hello"}})
        assert link.receive(60.0)["answer"] == 1
        link.close()
        assert [line for line in view.view().lines if "hello" in line] == ["hello", "a child says hello"]


def test_the_controller_ends_when_rank_0_is_killed() -> None:
    program = (
        "from megatron_fipo.trainer.controller_link import ControllerLink\n"
        f"print(ControllerLink({STAND_IN!r}).process.pid, flush=True)\n"
        "input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank_0:
        assert rank_0.stdout is not None
        controller = os.pidfd_open(int(rank_0.stdout.readline()))
        rank_0.kill()
    assert select.select([controller], [], [], 120.0)[0] == [controller]
    os.close(controller)


def test_the_controller_ends_when_its_line_is_closed() -> None:
    link = ControllerLink(STAND_IN)
    with closing(link):
        link.send({"request": 1, "do": "take_time", "with": {"seconds": 600.0}})
        assert link.receive(60.0)["news"] == "advance"
    assert link.process.returncode == 0


def give_up() -> dict[str, Any]:
    """Rank 0 alone hears of a stop, while all ranks wait."""
    is_main = dist.get_rank() == 0
    link, stop = ControllerLink(STAND_IN) if is_main else None, StopRequest()
    calls = ControllerCalls(link, stop=stop)
    calls.ask("echo", {})
    timer = threading.Timer(0.2, stop.ask, ["SIGUSR1"])
    if is_main:
        timer.start()
    started, reason = time.monotonic(), ""
    try:
        calls.ask("count_late", {"size": 5, "seconds": 1.0}, may_stop=True)
    except StopRequested as request:
        reason = str(request)
    seen: dict[str, Any] = {"reason": reason, "seconds": time.monotonic() - started}
    # What cannot be given up is waited for; the answer that nobody wants any more comes first.
    _, arrays = calls.ask("count_late", {"size": 7, "seconds": 1.5})
    seen["next"] = len(arrays["numbers"]) if is_main else None
    if link is not None:
        link.close()
    return seen


def test_a_wait_is_given_up_by_all_ranks() -> None:
    seen = run_distributed(give_up, 2)
    for of_rank in seen:
        assert of_rank["reason"] == "SIGUSR1"
        assert of_rank["seconds"] < 0.9, "the answer would have come after 1 s"
    assert seen[0]["next"] == 7
