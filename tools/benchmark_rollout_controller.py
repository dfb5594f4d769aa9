"""Takes in long responses from a stub server over HTTP: the engine, and beside it the plain way.

The stub answers as fast as it can with bytes made beforehand, but only once so many requests are in flight. "plain" is
what one would write first: aiohttp, `json`, Python lists, in one process. Both keep all responses, as a step does. Each
runs in a process of its own; its processor time is its own, the stub's is told apart. Prints one JSON object.

    python tools/benchmark_rollout_controller.py [--responses 6144] [--in-flight 4096] [--tokens 10000]
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

VOCABULARY = 151_936
PROMPT_TOKENS = 512
RID_PLACE = b"R" * 32
# Answers that may be under way at once, beside the requests that are held.
WINDOW = 256


def main() -> None:
    """Run every way in a process of its own, each against a fresh stub."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=6_144, help="requests in all")
    parser.add_argument("--in-flight", type=int, default=4_096, help="requests that the stub holds at all times")
    parser.add_argument("--tokens", type=int, default=10_000, help="tokens of each response")
    parser.add_argument("--ways", nargs="+", choices=("engine", "plain"), default=["engine", "plain"])
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=("parent", "stub", "way"), default="parent", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "stub":
        asyncio.run(serve(options))
    elif options.role == "way":
        print(json.dumps(asyncio.run(take_in(options.ways[0], options))))
    else:
        print(json.dumps(compare(options), indent=2))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All ways, their ratio, and what a step of 8,192 responses of 10,000 tokens costs."""
    results = {way: _run(way, options) for way in options.ways}
    for result in results.values():
        result["processor_s_for_8192_x_10k"] = round(8_192 * 10_000 / result["tokens_per_processor_s"], 1)
    told: dict[str, Any] = {"responses": options.responses, "in_flight": options.in_flight, "tokens": options.tokens}
    told |= results
    if len(results) == 2:
        for figure in ("tokens_per_s", "tokens_per_processor_s"):
            told[f"engine_over_plain_{figure}"] = round(results["engine"][figure] / results["plain"][figure], 2)
    return told


def _run(way: str, options: argparse.Namespace) -> dict[str, Any]:
    shared = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("responses", "in-flight", "tokens")]
    command = [sys.executable, __file__, *shared]
    with subprocess.Popen([*command, "--role", "stub"], stdout=subprocess.PIPE, text=True) as stub:
        assert stub.stdout is not None
        try:
            url = stub.stdout.readline().strip()
            asked = [*command, "--role", "way", "--url", url, "--ways", way]
            told: dict[str, Any] = json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE).stdout)
            told["stub_processor_s"] = float(stub.stdout.readline())
        finally:
            stub.kill()
    return told


# The stub.


def make_answer(count: int) -> tuple[bytes, bytes]:
    """An answer in SGLang's layout, before and after the rid."""
    draws = np.random.default_rng(0)
    ids = draws.integers(0, VOCABULARY, count)
    log_probs = -draws.exponential(0.7, count).astype(np.float32)
    entries = [[float(log_prob), int(id), None] for log_prob, id in zip(log_probs, ids, strict=True)]
    answer = {
        "text": "word " * count,
        "output_ids": ids.tolist(),
        "meta_info": {
            "id": RID_PLACE.decode(),
            "finish_reason": {"type": "length", "length": count},
            "prompt_tokens": PROMPT_TOKENS,
            "weight_version": "3",
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": entries,
            "output_token_logprobs_length": count,
            "reasoning_tokens": 0,
            "completion_tokens": count,
            "cached_tokens": 0,
            "weight_versions": [{"version": "3", "start": 0, "end": count}],
            "cached_tokens_details": None,
            "dp_rank": None,
            "e2e_latency": 100.5,
            "response_sent_to_client_ts": 1795387678.581102,
        },
    }
    body = orjson.dumps(answer)
    before, after = body.split(RID_PLACE)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + before, after


class Stub(asyncio.Protocol):
    """A connection. Requests wait until enough are in flight; then each that comes lets the oldest go."""

    before, after = b"", b""
    hold, total, num_seen = 0, 0, 0
    waiting: deque[tuple["Stub", bytes]] = deque()
    done: asyncio.Event
    num_answered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        """Collect a request; a body ends where its length says."""
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        place = head.find(b"content-length:")
        length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        body = bytes(self.buffer[end + 4 : end + 4 + length])
        self.buffer.clear()
        self.request(head.split(b" ", 2)[1], body)

    def request(self, path: bytes, body: bytes) -> None:
        """Answer at once what is cheap, and hold /generate."""
        if path != b"/generate":
            self.tell(path)
            return
        place = body.index(b'"rid"')
        Stub.waiting.append((self, body[place:].split(b'"', 4)[3]))
        Stub.num_seen += 1
        while len(Stub.waiting) >= Stub.hold or (Stub.waiting and Stub.num_seen >= Stub.total):
            connection, rid = Stub.waiting.popleft()
            connection.transport.writelines([Stub.before, rid, Stub.after])
            Stub.num_answered += 1
        if Stub.num_answered >= Stub.total:
            Stub.done.set()

    def tell(self, path: bytes) -> None:
        """What the engine asks beside."""
        told: dict[str, Any] = {"weight_version": "3"}
        if path == b"/server_info":
            told = {
                "internal_states": [told],
                "tp_size": 1,
                "base_gpu_id": 0,
                "max_req_input_len": 1 << 20,
                "enable_deterministic_inference": False,
                "enable_return_routed_experts": False,
                "version": "0.5.21",
            }
        body = orjson.dumps(told)
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


async def serve(options: argparse.Namespace) -> None:
    """Be the stub, and tell the processor time that the answers took."""
    _raise_file_limit(options.in_flight)
    Stub.before, Stub.after = make_answer(options.tokens)
    Stub.hold, Stub.total, Stub.done = options.in_flight, options.responses, asyncio.Event()
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=options.in_flight)
    before = time.process_time()
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await Stub.done.wait()
    while any(connection.get_write_buffer_size() for connection in _transports(server)):
        await asyncio.sleep(0.05)
    print(round(time.process_time() - before, 2), flush=True)
    await asyncio.Event().wait()


def _transports(server: asyncio.Server) -> list[asyncio.WriteTransport]:
    return list(getattr(server, "_clients", ()))


# What takes the responses in.


async def take_in(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Take all responses in, keep them, and tell what that took."""
    _raise_file_limit(options.in_flight)
    # Imported before the clock starts.
    work = {"engine": take_in_by_engine, "plain": take_in_plainly}[way]
    begin = await work(options)
    memory, clock, processor = _peak_bytes(), time.perf_counter(), time.process_time()
    num_tokens = await begin()
    seconds, processor_s = time.perf_counter() - clock, time.process_time() - processor
    return {
        "seconds": round(seconds, 2),
        "processor_s": round(processor_s, 2),
        "tokens_per_s": round(num_tokens / seconds),
        "tokens_per_processor_s": round(num_tokens / processor_s),
        "peak_mib_per_million_tokens": round((_peak_bytes() - memory) / 2**20 / (num_tokens / 1e6), 1),
    }


async def take_in_by_engine(options: argparse.Namespace) -> Any:
    """By `SglangEngine`."""
    from megatron_fipo.config.rollout import RolloutConfig
    from megatron_fipo.config.sglang import SglangConfig
    from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
    from megatron_fipo.rollout.servers.registry import ServerLife
    from megatron_fipo.rollout.sglang.engine import SglangEngine

    class OneServer:
        """A pool of the stub alone."""

        api_key = None
        lives = [ServerLife(name="stub", url=options.url, tensor_parallel_size=1, may_restart=False)]
        num_coming = 0

        async def wait_for_change(self, known: Sequence[ServerLife], known_coming: int) -> None:
            """Nothing changes after the beginning."""
            if known:
                await asyncio.Event().wait()

        async def restart(self, name: str, reason: str) -> None:
            """Not here."""
            raise RuntimeError(reason)

        async def close(self) -> None:
            """Nothing to end."""

    config = RolloutConfig(
        engine="sglang",
        max_requests_in_flight=options.in_flight + WINDOW,
        max_response_tokens=options.tokens,
        sglang=SglangConfig(urls=(options.url,)),
    )
    sampling = SamplingParameters(temperature=1.0, top_p=1.0, max_tokens=options.tokens, stop_token_ids=(1,))
    prompts = make_prompts(options.responses)
    requests = [
        GenerationRequest(
            prompt_id=str(number // config.group_size),
            sample_index=number % config.group_size,
            prompt_token_ids=prompts[number],
            seed=number,
            sampling=sampling,
        )
        for number in range(options.responses)
    ]

    async def begin() -> int:
        kept: list[GenerationResult] = []
        async with SglangEngine(OneServer(), config, VOCABULARY) as engine:
            while not engine.servers:
                # It raises what went wrong.
                await engine.submit([])
                await asyncio.sleep(0.001)
            await engine.resume(3, ())
            await engine.submit(requests)
            async for result in engine.stream():
                kept.append(result)
        assert len({result.request_id for result in kept}) == options.responses
        return sum(len(result.token_ids) for result in kept)

    return begin


async def take_in_plainly(options: argparse.Namespace) -> Any:
    """By aiohttp, `json` and lists."""
    import aiohttp

    prompts = [prompt.tolist() for prompt in make_prompts(options.responses)]

    async def begin() -> int:
        kept: list[tuple[list[int], list[float]]] = []
        bound = asyncio.Semaphore(options.in_flight + WINDOW)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def one(number: int) -> None:
                payload = {
                    "rid": f"{number:032d}",
                    "input_ids": prompts[number],
                    "sampling_params": {"temperature": 1.0, "max_new_tokens": options.tokens},
                    "return_logprob": True,
                }
                async with bound, session.post(f"{options.url}/generate", json=payload) as response:
                    answer = await response.json()
                meta = answer["meta_info"]
                assert meta["id"] == payload["rid"] and meta["finish_reason"]["type"] == "length"
                token_ids = answer["output_ids"]
                log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
                assert len(token_ids) == len(log_probs)
                kept.append((token_ids, log_probs))

            await asyncio.gather(*(one(number) for number in range(options.responses)))
        return sum(len(token_ids) for token_ids, _ in kept)

    return begin


def make_prompts(count: int) -> Any:
    """[count, PROMPT_TOKENS] int32."""
    return np.random.default_rng(1).integers(0, VOCABULARY, (count, PROMPT_TOKENS), dtype=np.int32)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _raise_file_limit(connections: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(connections + WINDOW + 256, hard), hard))


if __name__ == "__main__":
    main()
