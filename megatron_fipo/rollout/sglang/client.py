"""What an SGLang server is asked over HTTP, call by call, with errors that say which server, which call and what to do.

The calls are those of SGLang 0.5.21. Log-probabilities that it gives for generated tokens are taken after the division
by the temperature and before top-p and top-k; those of a prompt's tokens are at temperature 1, whatever is asked.
"""

import asyncio
import resource
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import numpy as np
import orjson
from yarl import URL

from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import FloatArray

MemoryTag = Literal["weights", "kv_cache"]
LoadFormat = Literal["flattened_bucket"]

PROBE_TIMEOUT_S = 30.0
"""SGLang itself gives its scheduler 20 s to show a sign of life."""

COMMAND_TIMEOUT_S = 120.0
"""What changes state waits for the scheduler's current batch, which may be a long prefill."""

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 120.0
"""How long an answer that has begun may take to arrive."""

FOLDER_VERSION = -1
"""Version of weights that came from a model folder rather than from this run."""

# SGLang closes a connection after 5 s without a request; one that is reused just then fails.
_KEEP_ALIVE_S = 3.0
# Files that are no connections.
_SPARE_FILES = 256
# SGLang takes 5 tokens off the longest sequence to get the longest prompt, and never fills the last place.
_TOKENS_BEYOND_LONGEST_PROMPT = 4


class ServerError(Exception):
    """A call to a server did not succeed.

    Attributes:
        url: The server.
        call: What was asked.
        problem: What happened.
        way_out: What to do.
    """

    def __init__(self, url: str, call: str, problem: str, way_out: str) -> None:
        super().__init__(url, call, problem, way_out)
        self.url, self.call, self.problem, self.way_out = url, call, problem, way_out

    def __str__(self) -> str:
        return f"{self.call} at {self.url}: {self.problem}; {self.way_out}"


class ServerUnreachableError(ServerError):
    """No answer: no connection, or one that ended or stayed silent."""


class ServerSilentError(ServerUnreachableError):
    """It took the request and did not answer in time."""


class ServerRefusedError(ServerError):
    """The server said no.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, url: str, call: str, problem: str, way_out: str, status: int) -> None:
        super().__init__(url, call, problem, way_out)
        self.status = status


class ServerNonsenseError(ServerError):
    """The answer is not what this call promises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server tells of itself.

    Attributes:
        policy_versions: Version of the weights as its front process and then every data-parallel worker has it;
            `FOLDER_VERSION` where it is no version of a run.
        tensor_parallel_size: Its ranks.
        first_gpu: Device of its first rank, among those that it sees; the others follow.
        max_sequence_tokens: Longest prompt plus response; a longer one it cuts without a word.
        is_deterministic: Whether it heeds seeds.
        returns_routed_experts: Whether it can tell the experts that tokens were sent to.
        release: Release of SGLang.
    """

    policy_versions: tuple[int, ...]
    tensor_parallel_size: int
    first_gpu: int
    max_sequence_tokens: int
    is_deterministic: bool
    returns_routed_experts: bool
    release: str


def policy_version_of(weight_version: str) -> int:
    """The number of a version of weights as servers write it; `FOLDER_VERSION` where it is not one of a run."""
    return int(weight_version) if weight_version.isascii() and weight_version.isdigit() else FOLDER_VERSION


def open_session(api_key: str | None, max_requests: int) -> aiohttp.ClientSession:
    """Connections to servers, one a request in flight, kept open between requests; made inside the event loop.

    Args:
        api_key: What the servers ask for; None where they ask for nothing.
        max_requests: Requests in flight at once; the limit on open files is raised for them.

    Raises:
        RunError: That limit may not be raised so far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_requests + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise RunError(
                f"{max_requests} requests in flight need {needed} open files, and this process may have {hard}: raise "
                f"the hard limit (`ulimit -n {needed}`), or lower rollout.max_requests_in_flight"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        # Every call has a deadline of its own.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
    )


class SglangServer:
    """One server. Every call raises `ServerError`, and may be cancelled.

    Args:
        url: Where it answers, such as http://10.1.0.7:30000.
        session: Connections, from `open_session`.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self._session = url.rstrip("/"), session

    async def is_ready(self, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
        """Whether it takes requests; false, not an error, where nobody answers."""
        try:
            await self._ask("GET", "ready", None, timeout_s)
        except ServerError:
            return False
        return True

    async def check_health(self, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        """Have its scheduler show that it works, which takes a second at least."""
        await self._ask("GET", "health_generate", None, timeout_s)

    async def info(self, timeout_s: float = PROBE_TIMEOUT_S) -> ServerInfo:
        """What it tells of itself."""
        front = await self._ask_json("GET", "model_info", None, timeout_s)
        told = await self._ask_json("GET", "server_info", None, timeout_s)
        try:
            workers = [worker["weight_version"] for worker in told["internal_states"]]
            return ServerInfo(
                policy_versions=tuple(policy_version_of(version) for version in (front["weight_version"], *workers)),
                tensor_parallel_size=int(told["tp_size"]),
                first_gpu=int(told["base_gpu_id"]),
                max_sequence_tokens=int(told["max_req_input_len"]) + _TOKENS_BEYOND_LONGEST_PROMPT,
                is_deterministic=bool(told["enable_deterministic_inference"]),
                returns_routed_experts=bool(told["enable_return_routed_experts"]),
                release=str(told["version"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._nonsense("server_info", f"it lacks or garbles {error}") from error

    async def generate(
        self,
        body: bytes,
        timeout_s: float,
        before_reading: Callable[[], Awaitable[object]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Send a request, and give its answer as it came.

        Args:
            body: JSON, from `generate_responses.request_body`.
            timeout_s: How long it may take until the answer begins.
            before_reading: Called once the answer begins; it is left in the network while this takes its time.
            headers: What a router wants to know.
        """
        return await self._ask("POST", "generate", body, timeout_s, before_reading, headers)

    async def response_log_probs(
        self, prompt_token_ids: Sequence[int], response_token_ids: Sequence[int], timeout_s: float = COMMAND_TIMEOUT_S
    ) -> FloatArray:
        """Log-probabilities of a given response, at temperature 1.

        The server computes them in one prefill and generates nothing. It takes nothing from its KV cache, which may be
        of older weights: it never does where log-probabilities of a whole prompt are asked for.

        Args:
            prompt_token_ids: At least one.
            response_token_ids: [R].
            timeout_s: How long it may take.

        Returns:
            [R] float32.
        """
        token_ids = [*map(int, prompt_token_ids), *map(int, response_token_ids)]
        payload = {
            "input_ids": token_ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._ask_json("POST", "generate", payload, timeout_s)
        try:
            entries = answer["meta_info"]["input_token_logprobs"]
            told = [entry[1] for entry in entries]
            # The first one of all has no log-probability.
            log_probs = np.array([entry[0] for entry in entries[len(prompt_token_ids) :]], dtype=np.float32)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._nonsense("generate", f"its log-probabilities of a prompt lack or garble {error}") from error
        if told != token_ids:
            raise self._nonsense("generate", f"log-probabilities of {len(told)} tokens, not of those that were sent")
        return log_probs

    async def pause_generation(self, mode: PauseMode, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Stop where it is; requests that come now wait for `continue_generation`.

        With "abort" it returns once every running request has ended.
        """
        await self._command("pause_generation", {"mode": mode}, timeout_s)

    async def continue_generation(self, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Go on after `pause_generation`; harmless where it is not paused."""
        await self._command("continue_generation", {}, timeout_s)

    async def abort_request(self, rid: str, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        """End the requests whose rid *begins* with this one; their answers have what they got so far."""
        assert rid, "an empty rid is the beginning of all"
        await self._command("abort_request", {"rid": rid}, timeout_s)

    async def flush_cache(self, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Forget the KV cache of earlier prompts; refused while requests run or wait."""
        await self._command("flush_cache", {}, timeout_s)

    async def begin_weight_update(self, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Make the weights loadable; refused where an update has begun already."""
        await self._command("begin_weight_update", {}, timeout_s)

    async def end_weight_update(self, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Make loaded weights ready for use."""
        await self._command("end_weight_update", {}, timeout_s)

    async def init_weights_update_group(
        self,
        address: tuple[str, int],
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float,
    ) -> None:
        """Have all its ranks join a process group; returns once the group is complete.

        Args:
            address: Host and port of the group's store.
            rank_offset: Rank of its first rank in the group.
            world_size: Ranks of the group.
            group_name: Name that the broadcasts use.
            backend: What it communicates by.
            timeout_s: How long it may take.
        """
        payload = {
            "master_address": address[0],
            "master_port": address[1],
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._command("init_weights_update_group", payload, timeout_s)

    async def destroy_weights_update_group(self, group_name: str, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Have all its ranks leave a process group."""
        await self._command("destroy_weights_update_group", {"group_name": group_name}, timeout_s)

    async def update_weights_from_distributed(
        self,
        tensors: Mapping[str, tuple[str, Sequence[int]]],
        group_name: str,
        timeout_s: float,
        load_format: LoadFormat | None = None,
    ) -> None:
        """Take in weights that rank 0 of the group broadcasts, in this order; returns once they are loaded.

        The KV cache is kept and the version is not changed.

        Args:
            tensors: Type ("bfloat16") and shape by name.
            group_name: The group.
            timeout_s: How long it may take.
            load_format: "flattened_bucket": one broadcast of bytes; None: one for each tensor.
        """
        payload = {
            "names": list(tensors),
            "dtypes": [dtype for dtype, _ in tensors.values()],
            "shapes": [list(shape) for _, shape in tensors.values()],
            "group_name": group_name,
            "flush_cache": False,
            "load_format": load_format,
        }
        await self._command("update_weights_from_distributed", payload, timeout_s)

    async def update_weights_from_tensor(
        self, serialized: Sequence[str], timeout_s: float, load_format: LoadFormat | None = None
    ) -> None:
        """Take in weights by handles to memory that the server shares.

        The KV cache is kept and the version is not changed.

        Args:
            serialized: What SGLang's serializer makes, in base64, one for each rank.
            timeout_s: How long it may take.
            load_format: "flattened_bucket": one tensor of bytes and its contents; None: named tensors.
        """
        payload = {"serialized_named_tensors": list(serialized), "flush_cache": False, "load_format": load_format}
        await self._command("update_weights_from_tensor", payload, timeout_s)

    async def update_weights_from_disk(self, folder: str, timeout_s: float) -> None:
        """Take in a model folder's weights; the KV cache is kept and the version is not changed."""
        payload = {"model_path": folder, "flush_cache": False}
        await self._command("update_weights_from_disk", payload, timeout_s)

    async def update_weight_version(self, policy_version: int, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Say which version its weights are; running requests go on."""
        payload = {"new_version": str(policy_version), "abort_all_requests": False}
        await self._command("update_weight_version", payload, timeout_s)

    async def checksums(self, timeout_s: float = COMMAND_TIMEOUT_S) -> list[dict[str, str]]:
        """Hash of each of its parameters, under its own names, for every rank."""
        answer = await self._command("weights_checker", {"action": "checksum"}, timeout_s)
        try:
            return [dict(rank["checksums"]) for rank in answer["ranks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise self._nonsense("weights_checker", f"it lacks or garbles {error}") from error

    async def release_memory_occupation(self, tags: Sequence[MemoryTag], timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Give the GPU's memory back; the server must be paused and idle."""
        await self._command("release_memory_occupation", {"tags": list(tags)}, timeout_s)

    async def resume_memory_occupation(self, tags: Sequence[MemoryTag], timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Take the GPU's memory again; what was in it is lost."""
        await self._command("resume_memory_occupation", {"tags": list(tags)}, timeout_s)

    async def _command(self, call: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        """Ask for something to be done; some calls tell in the body alone that it was not."""
        body = await self._ask("POST", call, orjson.dumps(payload), timeout_s)
        answer = self._decode(call, body) if body.startswith(b"{") else {}
        if answer.get("success", True) is not True:
            raise self._refused(call, 200, body)
        return answer

    async def _ask_json(self, method: str, call: str, payload: Any, timeout_s: float) -> Any:
        body = None if payload is None else orjson.dumps(payload)
        return self._decode(call, await self._ask(method, call, body, timeout_s))

    def _decode(self, call: str, body: bytes) -> Any:
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise self._nonsense(call, f"{_excerpt(body)} is not JSON") from error
        if not isinstance(answer, dict):
            raise self._nonsense(call, f"{_excerpt(body)} is not an object")
        return answer

    async def _ask(
        self,
        method: str,
        call: str,
        body: bytes | None,
        timeout_s: float,
        before_reading: Callable[[], Awaitable[object]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Send a request and read its answer to the end."""
        if body is not None:
            headers = {"Content-Type": "application/json", **(headers or {})}
        # The path needs no quoting, and to look for what does takes time.
        url = URL(f"{self.url}/{call}", encoded=True)
        try:
            async with (
                asyncio.timeout(timeout_s) as deadline,
                self._session.request(method, url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                if before_reading is not None:
                    deadline.reschedule(None)
                    await before_reading()
                    deadline.reschedule(asyncio.get_running_loop().time() + READ_TIMEOUT_S)
                answer = await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise self._unreachable(call, f"no connection in {CONNECT_TIMEOUT_S:g} s") from error
        except TimeoutError as error:
            raise self._unreachable(call, f"no answer in {timeout_s:g} s", ServerSilentError) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise self._unreachable(call, f"{type(error).__name__}: {error}") from error
        except aiohttp.ClientError as error:
            raise self._nonsense(call, f"{type(error).__name__}: {error}") from error
        if response.status != 200:
            raise self._refused(call, response.status, answer)
        return answer

    def _unreachable(
        self, call: str, problem: str, kind: type[ServerUnreachableError] = ServerUnreachableError
    ) -> ServerUnreachableError:
        return kind(
            self.url, call, problem, "the server's own log tells whether it ended or hangs; otherwise check the network"
        )

    def _refused(self, call: str, status: int, body: bytes) -> ServerRefusedError:
        way_out = {
            401: "give the key that this server was started with (rollout.sglang.api_key_file)",
            403: "give the key that this server was started with (rollout.sglang.api_key_file)",
            404: "send control calls to a server itself, not to a router, and check its release (0.5.21)",
        }.get(status, "the server's own log has more")
        return ServerRefusedError(self.url, call, f"status {status}: {_excerpt(body)}", way_out, status)

    def _nonsense(self, call: str, problem: str) -> ServerNonsenseError:
        return ServerNonsenseError(
            self.url, call, problem, "check that the address is an SGLang server's and its release (0.5.21)"
        )


def _excerpt(body: bytes) -> str:
    text = body[:400].decode("utf-8", "replace").strip()
    return text if text else "(an empty answer)"
