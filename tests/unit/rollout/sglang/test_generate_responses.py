import base64
import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.rollout.engine import GenerationRequest, SamplingParameters
from megatron_fipo.rollout.sglang.generate_responses import (
    ResponseError,
    RoutingShape,
    input_token_ids,
    read_response,
    request_body,
)

VOCABULARY = 1000
RID = "0123456789abcdef0123456789abcdef"
ROUTING = RoutingShape(num_layers=3, moe_layers=(1, 2), num_experts=8, experts_per_token=2)


def make_request(max_tokens: int = 4, begun: int = 0, with_routing: bool = False, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt_id="7:train:3",
        sample_index=2,
        prompt_token_ids=np.arange(5, dtype=np.int32),
        seed=11,
        sampling=SamplingParameters(
            **{"temperature": 0.7, "top_p": 0.9, "max_tokens": max_tokens, "stop_token_ids": (9,), **sampling}
        ),
        begun_token_ids=np.arange(50, 50 + begun, dtype=np.int32) if begun else None,
        with_routing=with_routing,
    )


def make_answer(ids: list[int], log_probs: list[Any] | None = None, **meta: Any) -> dict[str, Any]:
    """An answer as SGLang 0.5.21 gives it."""
    log_probs = [-0.5] * len(ids) if log_probs is None else log_probs
    return {
        "text": 'a "quoted" \\ text with "output_ids":[1,2] and "output_token_logprobs":[[ in it',
        "output_ids": ids,
        "meta_info": {
            "id": RID,
            "finish_reason": {"type": "length", "length": len(ids)},
            "prompt_tokens": 5,
            "weight_version": "3",
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": [[log_prob, id, None] for log_prob, id in zip(log_probs, ids, strict=True)],
            "output_token_logprobs_length": len(ids),
            "completion_tokens": len(ids),
            "weight_versions": [{"version": "3", "start": 0, "end": len(ids)}],
            "cached_tokens_details": None,
            "e2e_latency": 0.25,
            **meta,
        },
    }


def read(answer: dict[str, Any] | bytes, request: GenerationRequest | None = None) -> Any:
    body = answer if isinstance(answer, bytes) else orjson.dumps(answer)
    return read_response(body, request or make_request(), RID, VOCABULARY, ROUTING)


float32 = st.floats(-40, 0, width=32)


@st.composite
def answers(draw: st.DrawFn) -> tuple[dict[str, Any], GenerationRequest]:
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=40))
    log_probs = draw(st.lists(float32, min_size=len(ids), max_size=len(ids)))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=3))) if len(ids) > 1 else []
    bounds = [0, *cuts, len(ids)]
    spans = [
        {"version": str(5 + number), "start": start, "end": end}
        for number, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    finish = {"type": "abort", "message": draw(st.text())} if not ids or draw(st.booleans()) else {"type": "length"}
    answer = make_answer(ids, log_probs, weight_versions=spans, finish_reason=finish)
    answer["text"] = draw(st.text())
    # Without the text, as a server without a tokenizer.
    if draw(st.booleans()):
        del answer["text"]
    return answer, make_request(max_tokens=max(1, len(ids)))


@given(answers(), st.sampled_from([orjson.dumps, lambda answer: json.dumps(answer).encode()]))
def test_arrays_are_what_json_says(drawn: tuple[dict[str, Any], GenerationRequest], dump: Any) -> None:
    answer, request = drawn
    body = dump(answer)
    result = read(body, request)
    plain = json.loads(body)
    entries = plain["meta_info"]["output_token_logprobs"]
    assert result.token_ids.dtype == np.int32 and result.token_ids.tolist() == plain["output_ids"]
    np.testing.assert_array_equal(result.log_probs, np.float32([entry[0] for entry in entries]))
    assert result.log_probs.dtype == np.float32
    assert result.finish_reason == plain["meta_info"]["finish_reason"]["type"]
    assert result.request_id == request.request_id
    versions = [
        int(span["version"])
        for span in plain["meta_info"]["weight_versions"]
        for _ in range(span["start"], span["end"])
    ]
    if versions:
        assert result.policy_version == versions[0]
        told = [result.policy_version] * len(versions) if result.policy_versions is None else result.policy_versions
        np.testing.assert_array_equal(told, versions)


@given(answers(), st.data())
def test_a_cut_answer_is_refused_wherever_it_is_cut(
    drawn: tuple[dict[str, Any], GenerationRequest], data: st.DataObject
) -> None:
    answer, request = drawn
    body = orjson.dumps(answer)
    with pytest.raises(ResponseError) as told:
        read(body[: data.draw(st.integers(0, len(body) - 1))], request)
    assert told.value.kind == "json"


@settings(max_examples=300)
@given(answers(), st.data())
def test_a_garbled_answer_is_refused_or_says_what_its_json_says(
    drawn: tuple[dict[str, Any], GenerationRequest], data: st.DataObject
) -> None:
    answer, request = drawn
    body = bytearray(orjson.dumps(answer))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.sampled_from(b'0519.-+eE,[]{}"nul: \n\\x'))
    try:
        result = read(bytes(body), request)
    except ResponseError:
        return
    try:
        plain = json.loads(bytes(body))
    except ValueError:
        # Digits may come in a form that JSON does not know, such as 07; the number is the same.
        assert len(result.token_ids) == len(answer["output_ids"])
        return
    assert result.token_ids.tolist() == plain["output_ids"]
    entries = plain["meta_info"]["output_token_logprobs"]
    np.testing.assert_array_equal(result.log_probs, np.float32([entry[0] for entry in entries]))


def with_entry(place: int, entry: Any) -> dict[str, Any]:
    answer = make_answer([1, 2, 3, 4])
    answer["meta_info"]["output_token_logprobs"][place] = entry
    return answer


def without(*path: str) -> dict[str, Any]:
    answer = make_answer([1, 2, 3, 4])
    inner = answer
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return answer


def with_ids(ids: list[Any]) -> dict[str, Any]:
    return {**make_answer([1, 2, 3, 4]), "output_ids": ids}


SPAN = {"version": "3", "start": 0, "end": 4}


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (b"", "json", "0 bytes"),
        (b"Bad Gateway", "json", "not JSON"),
        (b"[]", "json", "lacks or garbles"),
        (without("output_ids"), "json", "output_ids"),
        (without("meta_info"), "json", "meta_info"),
        (without("meta_info", "output_token_logprobs"), "json", "output_token_logprobs"),
        (make_answer([1, 2, 3, 4], id="f" * 32), "request", "ffff"),
        (without("meta_info", "id"), "request", "None"),
        (with_ids([1, 2, 3]), "log_probs", "4 log-probabilities for 3 tokens"),
        (with_ids([1, 2, 3, 4, 5]), "log_probs", "4 log-probabilities for 5 tokens"),
        (with_ids([]), "log_probs", "4 log-probabilities for 0 tokens"),
        (with_ids([1, 2, 8, 4]), "ids", "token 2 is 8, and its log-probability is that of 3"),
        (make_answer([1, 2, 1000, 4]), "vocabulary", "token 2 is 1000"),
        (make_answer([1, -2, 3, 4]), "vocabulary", "token 1 is -2"),
        (make_answer([1, 2**31, 3, 4]), "vocabulary", "31 bits"),
        (with_ids([1, 2.0, 3, 4]), "number", "not an integer"),
        (with_ids([1, "2", 3, 4]), "number", "not an integer"),
        (with_ids([1, True, 3, 4]), "number", "not an integer"),
        (with_entry(1, [None, 2, None]), "number", "token 1 is None"),
        (with_entry(0, ["-0.5", 1, None]), "number", "token 0 is '-0.5'"),
        (with_entry(2, [-0.5, 3.5, None]), "number", "not an integer"),
        (with_entry(3, []), "json", "lacks or garbles"),
        (with_entry(1, [-1e200, 2, None]), "number", "token 1 is -inf"),
        (orjson.dumps(make_answer([1, 2, 3, 4])).replace(b"-0.5,2", b"NaN,2"), "json", "not JSON"),
        (make_answer([1, 2, 3]), "length", "cut off after 3 of 4"),
        (make_answer([1, 2, 3, 4, 5]), "length", "at most 4"),
        (make_answer([1, 2], finish_reason={"type": "stop", "matched": 1}), "finish", "stopped at 1"),
        (make_answer([1, 2], finish_reason={"type": "stop", "matched": "NaN happened"}), "finish", "NaN happened"),
        (make_answer([], finish_reason={"type": "stop", "matched": 1}), "finish", "stopped at 1"),
        (make_answer([1, 2], finish_reason=None), "finish", "None"),
        (make_answer([1, 2], finish_reason="stop"), "finish", "stop"),
        (make_answer([1, 2, 3, 4], weight_versions=[{**SPAN, "end": 3}]), "version", "4 tokens"),
        (make_answer([1, 2, 3, 4], weight_versions=[{**SPAN, "start": 1}]), "version", "4 tokens"),
        (make_answer([1, 2, 3, 4], weight_versions=[{**SPAN, "end": 5}]), "version", "4 tokens"),
        (make_answer([1, 2, 3, 4], weight_versions=[SPAN, {**SPAN, "start": 3}]), "version", "4 tokens"),
        (make_answer([1, 2, 3, 4], weight_versions=[3]), "version", "4 tokens"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_kind(answer: Any, kind: str, text: str) -> None:
    with pytest.raises(ResponseError) as told:
        read(answer)
    assert told.value.kind == kind
    assert text in str(told.value)


def test_a_text_in_the_third_place_of_an_entry_does_no_harm() -> None:
    result = read(with_entry(1, [-0.25, 2, "]],[x"]))
    assert result.log_probs.tolist() == [-0.5, -0.25, -0.5, -0.5]


def test_a_response_that_stopped_ends_with_its_stop_token() -> None:
    result = read(make_answer([1, 9], finish_reason={"type": "stop", "matched": 9}))
    assert (result.finish_reason, result.token_ids.tolist()) == ("stop", [1, 9])


def test_weights_of_a_folder_have_no_version_of_the_run() -> None:
    answer = make_answer([1, 2, 3, 4], weight_version="default")
    del answer["meta_info"]["weight_versions"]
    result = read(answer)
    assert (result.policy_version, result.policy_versions) == (-1, None)


def test_an_aborted_request_that_never_ran_has_no_tokens() -> None:
    meta = {"id": RID, "finish_reason": {"type": "abort", "message": "Abort in waiting queue"}, "weight_version": "3"}
    result = read({"text": "", "output_ids": [], "meta_info": {**meta, "output_token_logprobs": []}})
    assert (result.finish_reason, len(result.token_ids), result.policy_version) == ("abort", 0, 3)


def routed(rows: int, layers: int = 3, k: int = 2, highest: int = 7) -> str:
    experts = np.arange(rows * layers * k, dtype="<i4").reshape(rows, layers, k) % (highest + 1)
    return base64.b64encode(experts.tobytes()).decode()


def test_experts_are_those_of_the_layers_that_have_some() -> None:
    request = make_request(max_tokens=6, begun=2, with_routing=True)
    rows = 5 + 2 + 4 - 1
    result = read(make_answer([1, 2, 3, 4], routed_experts=routed(rows)), request)
    assert result.routed_experts.dtype == np.int16
    expected = (np.arange(rows * 6).reshape(rows, 3, 2) % 8)[:, 1:]
    np.testing.assert_array_equal(result.routed_experts, expected)


@pytest.mark.parametrize(
    ("experts", "text"),
    [
        (None, "enable_return_routed_experts"),
        (routed(7), "42 experts, which are not"),
        (routed(8, layers=2), "which are not"),
        (routed(8, highest=8), "outside of 8"),
        (routed(8)[:-1], "cannot be read"),
        ("*" * 64, "cannot be read"),
        (7, "cannot be read"),
    ],
)
def test_experts_of_other_positions_layers_or_numbers_are_refused(experts: Any, text: str) -> None:
    meta = {} if experts is None else {"routed_experts": experts}
    with pytest.raises(ResponseError, match=text) as told:
        read(make_answer([1, 2, 3, 4], **meta), make_request(with_routing=True))
    assert told.value.kind == "routing"


def test_a_request_names_its_attempt_and_goes_on_where_it_was_interrupted() -> None:
    request = make_request(max_tokens=10, begun=3, with_routing=True)
    body = json.loads(request_body(request, RID, 4, with_seed=True))
    assert body == {
        "rid": RID,
        "input_ids": [0, 1, 2, 3, 4, 50, 51, 52],
        "sampling_params": {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_new_tokens": 7,
            "stop_token_ids": [9],
            "skip_special_tokens": False,
            "sampling_seed": 11,
        },
        "return_logprob": True,
        "return_routed_experts": True,
        "extra_key": "4",
    }
    np.testing.assert_array_equal(input_token_ids(request), body["input_ids"])


def test_greedy_is_temperature_0_and_a_seed_goes_only_to_who_heeds_it() -> None:
    parameters = json.loads(request_body(make_request(greedy=True), RID, 4, with_seed=False))["sampling_params"]
    assert (parameters["temperature"], parameters["top_p"]) == (0.0, 1.0)
    assert "sampling_seed" not in parameters
