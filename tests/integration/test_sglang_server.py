"""A real SGLang server: that token ids go in and come out as the engine needs it, and that nothing of it is left."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.process_groups import members, wait_until_empty
from tests.sglang_servers import RunningServer, needs_sglang, running_server

pytestmark = needs_sglang

# SGLang looks for a dead process once a second.
SOON_S = 20.0


def open_call(server: RunningServer, path: str, message: dict[str, Any], key: str | None = None) -> Any:
    request = urllib.request.Request(
        server.url + path,
        json.dumps(message).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key or server.api_key}"},
    )
    return urllib.request.urlopen(request, timeout=300)


def message(max_tokens: int, **sampling: Any) -> dict[str, Any]:
    parameters = {"temperature": 0.0, "max_new_tokens": max_tokens} | sampling
    return {"input_ids": [5, 6, 7, 8], "sampling_params": parameters, "return_logprob": True}


def generate(server: RunningServer, max_tokens: int, **sampling: Any) -> dict[str, Any]:
    with open_call(server, "/generate", message(max_tokens, **sampling)) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer


def test_token_ids_go_in_and_come_out_without_a_tokenizer(sglang_server: RunningServer) -> None:
    reply = generate(sglang_server, 8)
    tokens = reply["output_ids"]
    assert len(tokens) == 8
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    assert [token for _, token, *_ in reply["meta_info"]["output_token_logprobs"]] == tokens
    assert all(log_prob < 0 for log_prob, *_ in reply["meta_info"]["output_token_logprobs"])
    # The token that ends a response is its last one.
    stop = tokens[3]
    ended = generate(sglang_server, 8, stop_token_ids=[stop])
    assert ended["output_ids"] == tokens[: tokens.index(stop) + 1]
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    # A prompt that is in the cache now.
    assert generate(sglang_server, 8)["output_ids"] == tokens


def test_an_aborted_response_comes_with_what_it_has(sglang_server: RunningServer) -> None:
    long = message(250, ignore_eos=True) | {"rid": "to be aborted", "stream": True}
    with open_call(sglang_server, "/generate", long) as reply:
        events = (line.removeprefix(b"data: ").strip() for line in reply if line.startswith(b"data: "))
        next(events)
        with open_call(sglang_server, "/abort_request", {"rid": "to be aborted"}):
            pass
        last = json.loads([event for event in events if event != b"[DONE]"][-1])
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(last["output_ids"]) == len(last["meta_info"]["output_token_logprobs"]) < 250


def test_others_are_turned_away(sglang_server: RunningServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        open_call(sglang_server, "/generate", message(1), key="wrong")
    for process in members(sglang_server.process.group):
        assert sglang_server.api_key not in " ".join(psutil.Process(process).cmdline())


@pytest.mark.last
def test_nothing_is_left_when_its_first_process_is_killed(sglang_server: RunningServer) -> None:
    group = sglang_server.process.group
    assert len(members(group)) >= 3
    os.kill(group, signal.SIGKILL)
    assert sglang_server.run(sglang_server.process.wait()).startswith("was killed (SIGKILL)")
    wait_until_empty(group)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["sglang::scheduler", "sglang::detokenizer", "servers/guard"])
def test_nothing_is_left_whatever_is_killed(tmp_path: Path, victim: str) -> None:
    with running_server(tmp_path) as server:
        group = server.process.group
        candidates = [server.process.guard.pid, *members(group)]
        (process,) = [each for each in candidates if victim in " ".join(psutil.Process(each).cmdline())]
        os.kill(process, signal.SIGKILL)
        server.run(asyncio.wait_for(server.process.wait(), SOON_S))
        wait_until_empty(group)


PROGRAM = """
import sys
from pathlib import Path
from tests.sglang_servers import running_server

with running_server(Path(sys.argv[1])) as server:
    print(server.process.group, flush=True)
    sys.stdin.read()
"""


@pytest.mark.exhaustive
def test_nothing_is_left_when_its_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    group = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    wait_until_empty(group)
