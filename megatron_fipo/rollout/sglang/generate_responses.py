"""What goes into and comes out of SGLang's /generate: a request's bytes, and an answer's bytes as checked arrays.

An answer has, for each token, `[log-probability, id, null]`, and all ids again. Those two lists are most of its bytes.
They are read by C parsers, without a Python object for each number, and what is around them is read as JSON. An answer
that is laid out in another way, or fails a check, is read again as plain JSON, which tells what is wrong with it.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.csv

from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult
from megatron_fipo.rollout.sglang.client import policy_version_of
from megatron_fipo.types import ExpertArray, FinishReason, FloatArray, IntArray

ResponseProblem = Literal[
    "json", "request", "log_probs", "ids", "vocabulary", "number", "finish", "length", "version", "routing"
]

_IDS, _LOG_PROBS, _ROUTING = b'"output_ids":[', b'"output_token_logprobs":[', b'"routed_experts":"'
# After the first entry, `,[-0.5,7,null],[…` becomes a line a token with an empty first column.
_TO_LINES = bytes(
    {ord("["): ord(" "), ord("]"): ord("\n"), ord("\n"): ord("!")}.get(character, character) for character in range(256)
)
_READ = pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 30, column_names=["", "log_prob", "id", "null"])
_PARSE = pyarrow.csv.ParseOptions(quote_char=False)
_CONVERT = pyarrow.csv.ConvertOptions(
    check_utf8=False,
    column_types={"": pa.null(), "log_prob": pa.float32(), "id": pa.int32(), "null": pa.null()},
    null_values=["", "null"],
)
_DIGITS_AND_COMMAS = b"0123456789,"


class ResponseError(Exception):
    """An answer that cannot be used.

    Attributes:
        kind: What is wrong: "json" (it is none, or cut off), "request" (another one's answer), "log_probs" (not one a
            token), "ids" (its two lists differ), "vocabulary" (an id outside of it), "number" (none, or not finite),
            "finish" (no reason that makes sense), "length" (longer or shorter than its reason says), "version" (tokens
            without one), "routing" (experts of other positions, layers or numbers).
        problem: The same in detail.
    """

    def __init__(self, kind: ResponseProblem, problem: str) -> None:
        super().__init__(kind, problem)
        self.kind, self.problem = kind, problem

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingShape:
    """Experts of a model, as a server tells them.

    Attributes:
        num_layers: All layers.
        moe_layers: Those with experts, in order.
        num_experts: Experts of a layer.
        experts_per_token: k.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """An answer taken apart: the JSON around the lists, and the lists."""

    frame: dict[str, Any]
    token_ids: IntArray
    scored_ids: IntArray
    log_probs: FloatArray
    routing: bytes | str | None


def num_begun(request: GenerationRequest) -> int:
    """Tokens of the response that are there already."""
    return 0 if request.begun_token_ids is None else len(request.begun_token_ids)


def input_token_ids(request: GenerationRequest) -> IntArray:
    """The prompt and what is there of the response: [P + B] int32."""
    if request.begun_token_ids is None:
        return request.prompt_token_ids
    return np.concatenate([request.prompt_token_ids, request.begun_token_ids])


def request_body(request: GenerationRequest, rid: str, policy_version: int, with_seed: bool) -> bytes:
    """A request as /generate takes it.

    Greedy decoding goes out as temperature 0, which SGLang turns into temperature 1 and top-k 1: the log-probabilities
    are then at temperature 1, whatever else is in the batch.

    Args:
        request: The request.
        rid: Names this attempt; no other rid may begin with it, because an abort would hit both.
        policy_version: Version of the server's weights. Prompts share a KV cache with those of this version alone:
            with pause mode "in_place" the server still has that of older weights.
        with_seed: Whether the server is deterministic and so heeds the seed.
    """
    sampling = request.sampling
    parameters: dict[str, Any] = {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
        "max_new_tokens": sampling.max_tokens - num_begun(request),
        "stop_token_ids": list(sampling.stop_token_ids),
        # Nobody reads the text.
        "skip_special_tokens": False,
    }
    if with_seed:
        parameters["sampling_seed"] = request.seed
    payload = {
        "rid": rid,
        "input_ids": np.ascontiguousarray(input_token_ids(request)),
        "sampling_params": parameters,
        "return_logprob": True,
        "extra_key": str(policy_version),
    }
    if request.with_routing:
        payload["return_routed_experts"] = True
    return orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)


def read_response(
    body: bytes, request: GenerationRequest, rid: str, vocabulary_size: int, routing: RoutingShape | None = None
) -> GenerationResult:
    """The result that an answer holds. It may run in any thread.

    Args:
        body: Answer of /generate.
        request: What was asked.
        rid: What the request was called.
        vocabulary_size: Ids lie below it.
        routing: Experts of the model; needed where the request asks for them.

    Raises:
        ResponseError: The answer cannot be used.
    """
    parts = _cut(body)
    if parts is None or _lists_problem(parts, vocabulary_size):
        parts = _read_slowly(body)
        if problem := _lists_problem(parts, vocabulary_size):
            raise ResponseError(*problem)
    meta = parts.frame["meta_info"]
    if meta.get("id") != rid:
        raise ResponseError("request", f"it is the answer to {str(meta.get('id'))[:80]}, not to {rid}")
    finish_reason = _finish_reason(meta, parts.token_ids, request)
    versions = _policy_versions(meta, len(parts.token_ids))
    same = not len(versions) or bool((versions == versions[0]).all())
    return GenerationResult(
        request_id=request.request_id,
        token_ids=parts.token_ids,
        log_probs=parts.log_probs,
        finish_reason=finish_reason,
        policy_version=int(versions[0]) if len(versions) else policy_version_of(str(meta.get("weight_version"))),
        policy_versions=None if same else versions,
        routed_experts=_routed_experts(parts, request, routing) if request.with_routing else None,
    )


def _cut(body: bytes) -> _Parts | None:
    """Take an answer apart without looking at each number; None where it is not laid out as SGLang does."""
    ids = body.find(_IDS) + len(_IDS)
    ids_end = body.find(b"]", ids)
    entries = body.find(_LOG_PROBS, ids_end) + len(_LOG_PROBS)
    if ids < len(_IDS) or ids_end < 0 or entries < len(_LOG_PROBS):
        return None
    entries_end = entries if body[entries : entries + 1] == b"]" else body.rfind(b"]]", entries) + 1
    rest = body.find(_ROUTING, entries_end)
    tail, routing = body[entries_end:], None
    if rest >= 0:
        rest += len(_ROUTING)
        rest_end = body.find(b'"', rest)
        tail, routing = body[entries_end:rest] + body[rest_end:], body[rest:rest_end]
    try:
        frame = orjson.loads(body[:ids] + body[ids_end:entries] + tail)
        meta = frame["meta_info"]
        # The places found are really those of these lists.
        if frame["output_ids"] or meta["output_token_logprobs"] or entries_end <= 0:
            return None
        told = meta.get("routed_experts")
        if routing is None:
            routing = told
        elif told != "":
            return None
        token_ids = _read_ids(body[ids:ids_end])
        scored = _read_entries(body[entries:entries_end])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if token_ids is None or scored is None:
        return None
    return _Parts(frame, token_ids, *scored, routing)


def _read_ids(text: bytes) -> IntArray | None:
    """`5,6,7` as an array; None where there is something else in it."""
    if not text:
        return np.empty(0, dtype=np.int32)
    if text.translate(None, _DIGITS_AND_COMMAS):
        return None
    # The ids are compared with those of the log-probabilities, so an overflow does not go unseen.
    ids = np.fromstring(text, dtype=np.int32, sep=",")
    return ids if len(ids) == text.count(b",") + 1 else None


def _read_entries(text: bytes) -> tuple[IntArray, FloatArray] | None:
    """`[-0.5,7,null],[-0.25,8,null]` as ids and log-probabilities; None where an entry is of another form."""
    if not text:
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
    table = pyarrow.csv.read_csv(pa.BufferReader((b"," + text).translate(_TO_LINES)), _READ, _PARSE, _CONVERT)
    ids, log_probs = table.column("id"), table.column("log_prob")
    if ids.null_count or log_probs.null_count:
        return None
    # A copy is writeable, and lets go of the parser's larger block.
    return ids.to_numpy(), log_probs.to_numpy().copy()


def _read_slowly(body: bytes) -> _Parts:
    """Take an answer apart as plain JSON.

    Raises:
        ResponseError: It is no JSON, or a list or a number is missing.
    """
    try:
        frame = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ResponseError("json", f"{len(body)} bytes are not JSON: {error}") from error
    try:
        meta = frame["meta_info"]
        token_ids, entries = frame["output_ids"], meta["output_token_logprobs"]
        log_probs, scored_ids = [entry[0] for entry in entries], [entry[1] for entry in entries]
        routing = meta.get("routed_experts")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ResponseError("json", f"it lacks or garbles {error}") from error
    return _Parts(frame, _ids(token_ids), _ids(scored_ids), _log_probs(log_probs), routing)


def _ids(values: Any) -> IntArray:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ResponseError("number", "a token id is not an integer")
    if any(not -(2**31) <= value < 2**31 for value in values):
        raise ResponseError("vocabulary", "a token id has more than 31 bits")
    return np.array(values, dtype=np.int32)


def _log_probs(values: list[Any]) -> FloatArray:
    if any(type(value) not in (int, float) for value in values):
        place = next(place for place, value in enumerate(values) if type(value) not in (int, float))
        raise ResponseError(
            "number", f"the log-probability of token {place} is {values[place]!r}; the server's weights may be broken"
        )
    # One that is too large becomes infinite, which is refused.
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32)


def _lists_problem(parts: _Parts, vocabulary_size: int) -> tuple[ResponseProblem, str] | None:
    """What is wrong with ids and log-probabilities, if anything is."""
    ids, scored, log_probs = parts.token_ids, parts.scored_ids, parts.log_probs
    if len(ids) != len(scored):
        return "log_probs", f"{len(scored)} log-probabilities for {len(ids)} tokens"
    if not len(ids):
        return None
    if not np.array_equal(ids, scored):
        place = int(np.argmax(ids != scored))
        return "ids", f"token {place} is {ids[place]}, and its log-probability is that of {scored[place]}"
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        place = int(np.argmax((ids < 0) | (ids >= vocabulary_size)))
        return "vocabulary", f"token {place} is {ids[place]}, outside of a vocabulary of {vocabulary_size}"
    if not np.isfinite(log_probs).all():
        place = int(np.argmin(np.isfinite(log_probs)))
        return "number", f"the log-probability of token {place} is {log_probs[place]}"
    return None


def _finish_reason(meta: dict[str, Any], token_ids: IntArray, request: GenerationRequest) -> FinishReason:
    """Why it ended, checked against the tokens.

    Raises:
        ResponseError: The reason is none, or the tokens say otherwise.
    """
    told = meta.get("finish_reason")
    told = told if isinstance(told, dict) else {}
    kind = told.get("type")
    most, count = request.sampling.max_tokens - num_begun(request), len(token_ids)
    if count > most:
        raise ResponseError("length", f"{count} tokens, where at most {most} were asked for")
    if kind == "abort":
        return "abort"
    if kind == "length":
        if count != most:
            raise ResponseError(
                "length",
                f"cut off after {count} of {most} tokens; raise context_length or max_total_tokens of the server",
            )
        return "length"
    if kind == "stop":
        if not count or told.get("matched") != token_ids[-1]:
            raise ResponseError("finish", f"it stopped at {told.get('matched')!r}, which is not its last token")
        return "stop"
    raise ResponseError("finish", f"it ended because of {meta.get('finish_reason')!r}")


def _policy_versions(meta: dict[str, Any], count: int) -> IntArray:
    """Version of the weights that gave each token: [count] int32.

    Raises:
        ResponseError: A token has none, or several.
    """
    spans = meta.get("weight_versions")
    if spans is None:
        return np.full(count, policy_version_of(str(meta.get("weight_version"))), dtype=np.int32)
    versions, end = np.empty(count, dtype=np.int32), 0
    try:
        for span in spans:
            if span["start"] != end or not end <= span["end"] <= count:
                _refuse_versions(spans, count)
            versions[end : span["end"]] = policy_version_of(span["version"])
            end = span["end"]
    except (KeyError, TypeError, AttributeError):
        _refuse_versions(spans, count)
    if end != count:
        _refuse_versions(spans, count)
    return versions


def _refuse_versions(spans: Any, count: int) -> NoReturn:
    raise ResponseError("version", f"the versions of {count} tokens are {str(spans)[:200]}")


def _routed_experts(parts: _Parts, request: GenerationRequest, routing: RoutingShape | None) -> ExpertArray | None:
    """[P + B + R − 1, MoE layers, k] int16; None where an aborted request was never run.

    Raises:
        ResponseError: They are missing, or not of these positions and this model.
    """
    assert routing is not None, "a request for experts needs the shape that they come in"
    told = parts.routing
    if told is None:
        if parts.frame["meta_info"]["finish_reason"]["type"] == "abort":
            return None
        raise ResponseError("routing", "it has no experts; start the server with enable_return_routed_experts")
    try:
        numbers: npt.NDArray[np.int32] = np.frombuffer(base64.b64decode(told, validate=True), dtype="<i4")
    except (binascii.Error, ValueError, TypeError) as error:
        raise ResponseError("routing", f"its experts cannot be read: {error}") from error
    rows = len(request.prompt_token_ids) + num_begun(request) + len(parts.token_ids) - 1
    shape = (rows, routing.num_layers, routing.experts_per_token)
    if numbers.size != rows * routing.num_layers * routing.experts_per_token:
        raise ResponseError("routing", f"{numbers.size} experts, which are not {list(shape)}")
    experts = numbers.reshape(shape)
    if len(routing.moe_layers) < routing.num_layers:
        experts = experts[:, list(routing.moe_layers)]
    if experts.size and (experts.min() < 0 or experts.max() >= routing.num_experts):
        raise ResponseError("routing", f"an expert is outside of {routing.num_experts}")
    return experts.astype(np.int16)
