"""The embedded engine over several ranks, and the weight stream that feeds it."""

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_fipo.actor.model import build_model, build_provider, unwrap
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.conversion.hf_folder import HfFolderWriter
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.parallel.context import build_parallel_context, destroy_parallel_context
from megatron_fipo.rollout.decoding import decode
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters, WeightBucket
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.runtime.stop_request import StopRequest, StopRequested
from megatron_fipo.trainer.rollout_side import EmbeddedRollouts
from megatron_fipo.weight_sync.in_process import InProcessSync
from tests.distributed_helpers import run_distributed
from tests.tiny_models import VOCAB_SIZE, write_tiny_model

pytestmark = pytest.mark.distributed

PLAIN = SamplingParameters(temperature=1.0, top_p=1.0, max_tokens=10, stop_token_ids=tuple(range(0, VOCAB_SIZE, 6)))
COLD = replace(PLAIN, temperature=0.5, top_p=0.9, max_tokens=6, stop_token_ids=())
GREEDY = replace(PLAIN, greedy=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("embedded") / "model")


def request(index: int, sampling: SamplingParameters) -> GenerationRequest:
    prompt = np.arange(1 + index % 3, 8, dtype=np.int32) * 5
    return GenerationRequest(
        prompt_id=f"p{index % 3}", sample_index=index, prompt_token_ids=prompt, seed=index, sampling=sampling
    )


def mixed_requests() -> list[GenerationRequest]:
    """Requests of three kinds, which change from one to the next now and then."""
    kinds = [PLAIN, PLAIN, PLAIN, COLD, PLAIN, GREEDY, GREEDY, COLD, COLD, COLD, COLD]
    return [request(index, sampling) for index, sampling in enumerate(kinds)]


def plain(results: list[GenerationResult]) -> list[dict[str, Any]]:
    return [
        {
            "id": result.request_id,
            "tokens": result.token_ids.tolist(),
            "log_probs": torch.from_numpy(result.log_probs),
            "finish": result.finish_reason,
            "version": result.policy_version,
        }
        for result in results
    ]


def assert_same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """Equal but for the rounding of log-probabilities, which depends on who shares a batch."""
    for mine, other in zip(left, right, strict=True):
        torch.testing.assert_close(mine["log_probs"], other["log_probs"], rtol=0, atol=2e-6)
        assert mine | {"log_probs": None} == other | {"log_probs": None}


def make_engine(folder: Path, max_batch_sequences: int = 3, version: int = 4) -> EmbeddedEngine:
    quiet_upstream()
    engine = EmbeddedEngine(
        json.loads((folder / "config.json").read_text()), folder, torch.float32, max_batch_sequences
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine.load(WeightBucket(tensors=dict(model.named_parameters()), policy_version=version, is_last=True))
    return engine


async def generate(engine: EmbeddedEngine, requests: list[GenerationRequest]) -> list[GenerationResult]:
    await engine.submit(requests)
    return [result async for result in engine.stream()]


async def generate_twice(engine: EmbeddedEngine) -> list[GenerationResult]:
    """Requests that are submitted while results come are served by the same stream."""
    results = []
    await engine.submit([request(0, PLAIN), request(1, PLAIN)])
    async for result in engine.stream():
        results.append(result)
        if len(results) == 1:
            await engine.submit([request(2, COLD)])
    return results


async def generate_without_aborted(engine: EmbeddedEngine) -> list[GenerationResult]:
    requests = mixed_requests()[:4]
    await engine.submit(requests)
    await engine.abort([requests[1].request_id, requests[3].request_id, "unknown#0"])
    return [result async for result in engine.stream()]


def serve_everything(folder: Path) -> dict[str, list[dict[str, Any]]] | None:
    engine = make_engine(folder)
    if dist.get_rank():
        engine.follow()
        return None
    results = {
        "mixed": plain(asyncio.run(generate(engine, mixed_requests()))),
        "one": plain(asyncio.run(generate(engine, [request(7, COLD)]))),
        "none": plain(asyncio.run(generate(engine, []))),
        "later": plain(asyncio.run(generate_twice(engine))),
        "aborted": plain(asyncio.run(generate_without_aborted(engine))),
        "again": plain(asyncio.run(generate(engine, mixed_requests()))),
    }
    engine.release()
    return results


@pytest.fixture(scope="module")
def served(model_folder: Path) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """What rank 0 got from 1, 2 and 3 ranks."""
    return {world: run_distributed(serve_everything, world, model_folder)[0] for world in (1, 2, 3)}


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[dict[str, Any]]:
    """Every mixed request decoded alone."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    return plain([decode(model, [each], policy_version=4)[0] for each in mixed_requests()])


def test_results_come_in_the_order_of_the_requests(served: dict[int, Any], expected: list[dict[str, Any]]) -> None:
    assert {len(each["tokens"]) for each in expected} > {6}, "lengths differ"
    assert {each["finish"] for each in expected} == {"stop", "length"}
    for world in (1, 2, 3):
        assert_same(served[world]["mixed"], expected)


def test_a_repeated_call_is_bitwise_equal(served: dict[int, Any]) -> None:
    for world in (1, 2, 3):
        for first, again in zip(served[world]["mixed"], served[world]["again"], strict=True):
            assert torch.equal(first["log_probs"], again["log_probs"])
            assert first["tokens"] == again["tokens"]


def test_fewer_requests_than_ranks_are_served(model_folder: Path, served: dict[int, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    alone = plain(decode(model, [request(7, COLD)], policy_version=4))
    for world in (1, 2, 3):
        assert_same(served[world]["one"], alone)
        assert served[world]["none"] == []


def test_requests_submitted_while_results_come_are_served(served: dict[int, Any]) -> None:
    for world in (1, 2, 3):
        assert [each["id"] for each in served[world]["later"]] == ["p0#0", "p1#1", "p2#2"]
        assert_same(served[world]["later"], served[1]["later"])


def test_aborted_requests_come_back_empty_and_first(served: dict[int, Any], expected: list[dict[str, Any]]) -> None:
    for world in (1, 2, 3):
        results = served[world]["aborted"]
        assert [(each["id"], each["finish"]) for each in results[:2]] == [("p1#1", "abort"), ("p0#3", "abort")]
        for each in results[:2]:
            assert (each["tokens"], each["log_probs"].numel(), each["version"]) == ([], 0, 4)
        assert_same(results[2:], [expected[0], expected[2]])


def refusal(engine: EmbeddedEngine, tensors: dict[str, torch.Tensor], is_last: bool) -> str:
    with pytest.raises((KeyError, RuntimeError)) as caught:
        engine.load(WeightBucket(tensors=tensors, policy_version=9, is_last=is_last))
    return str(caught.value)


def test_a_weight_stream_that_does_not_fit_is_refused(model_folder: Path) -> None:
    engine = make_engine(model_folder)
    weights = {name: parameter.clone() for name, parameter in engine.model.named_parameters()}
    norm = "model.norm.weight"
    assert refusal(engine, {"model.nrom.weight": weights[norm]}, False) == "'model.nrom.weight'"
    assert refusal(engine, {norm: weights[norm][:1]}, False) == f"the weight stream has {norm} as [1], not [64]"
    lacking = {name: tensor for name, tensor in weights.items() if name != norm}
    assert refusal(engine, lacking, True) == f"the weight stream lacks 1 tensors: ['{norm}']"
    assert engine.policy_version == 4, "an incomplete version is not current"
    engine.load(WeightBucket(tensors={norm: weights[norm]}, policy_version=9, is_last=True))
    assert engine.policy_version == 9
    # Every version is counted anew.
    assert "lacks" in refusal(engine, {norm: weights[norm]}, True)


def test_a_fresh_engine_has_no_version(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    assert EmbeddedEngine(config, model_folder, torch.float32, 1).policy_version == -1


FACTOR = 1.0625
ROPE_BASE = 500.0


def push_and_generate(folder: Path, target: Path, layout: dict[str, int]) -> dict[str, Any]:
    """Change the actor's weights, push them, and say what the engine then holds and generates."""
    quiet_upstream()
    parallelism = ParallelismConfig(**layout)
    context = build_parallel_context(parallelism, seed=0)
    bridge = HfBridge(folder, context_length=512, rope_base=ROPE_BASE)
    model = ModelConfig(path=folder, dtype="float32", context_length=512, rope_base=ROPE_BASE)
    chunks = unwrap(build_model(build_provider(bridge, model, parallelism, context), bridge, parallelism, context))
    engine = EmbeddedEngine(bridge.export_config(torch.float32), folder, torch.float32, max_batch_sequences=8)
    # A bucket of 1 MiB holds several of the tiny model's tensors, not all.
    sync = InProcessSync(bridge, chunks, engine, WeightSyncConfig(bucket_mib=1))
    for version, factor in ((0, 1.0), (5, FACTOR)):
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(factor)
        sync.push(version)
    outcome: dict[str, Any] = {
        "version": engine.policy_version,
        "weights": {name: tensor.clone() for name, tensor in engine.model.state_dict().items()},
    }
    stream = bridge.export(chunks)
    if dist.get_rank():
        for _ in stream:
            pass
        engine.follow()
    else:
        writer = HfFolderWriter(target, folder, bridge.export_config(torch.float32))
        writer.write(stream)
        writer.folder.commit()
        outcome["generated"] = plain(asyncio.run(generate(engine, mixed_requests())))
        engine.release()
    destroy_parallel_context()
    return outcome


LAYOUTS = {
    "TP 2 × CP 2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def pushed(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], Path]:
    world, layout = LAYOUTS[request.param]
    target = tmp_path_factory.mktemp("push") / "export"
    return run_distributed(push_and_generate, world, model_folder, target, layout), target


def test_every_rank_holds_the_actors_weights_after_a_push(
    model_folder: Path, pushed: tuple[list[dict[str, Any]], Path]
) -> None:
    source = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).state_dict()
    for outcome in pushed[0]:
        assert outcome["version"] == 5
        assert outcome["weights"].keys() == source.keys()
        for name, tensor in outcome["weights"].items():
            assert torch.equal(tensor, source[name] * FACTOR), name


def test_generation_after_a_push_is_that_of_the_export_in_transformers(
    pushed: tuple[list[dict[str, Any]], Path],
) -> None:
    outcomes, folder = pushed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.rope_parameters["rope_theta"] == ROPE_BASE
    assert model.config.max_position_embeddings == 512
    exported = plain([decode(model, [each], policy_version=5)[0] for each in mixed_requests()])
    assert_same(outcomes[0]["generated"], exported)


class AskAtFirstToken(Progress):
    """Asks for a stop as soon as a rank has begun to decode."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop, self.num_tokens = stop, 0

    def advance(self, done: int, total: int) -> None:
        self.num_tokens += 1
        self.stop.ask("SIGTERM")


def stop_on_rank(folder: Path, asked: int) -> dict[str, Any]:
    """One rank alone hears of a stop while all decode long responses of several kinds."""
    rank, stop = dist.get_rank(), StopRequest()
    engine, watcher = make_engine(folder), AskAtFirstToken(stop)
    if rank == asked:
        engine._progress, engine._stop = watcher, stop
    rollouts = EmbeddedRollouts(
        engine=engine,
        weight_sync=None,  # type: ignore[arg-type]
        controller=object() if rank == 0 else None,  # type: ignore[arg-type]
        stop=engine._stop,
    )
    reason = ""
    try:
        rollouts.generate(lambda _: generate(engine, mixed_requests()))
    except StopRequested as request:
        reason = str(request)
    # The ranks are still in step.
    return {"reason": reason, "tokens": watcher.num_tokens, "in_step": broadcast_json(rank + 7, 0)}


@pytest.mark.parametrize("asked", [0, 1])
def test_generation_is_given_up_by_all_ranks_in_order(model_folder: Path, asked: int) -> None:
    seen = run_distributed(stop_on_rank, 2, model_folder, asked)
    assert [each["reason"] for each in seen] == ["SIGTERM", "SIGTERM"]
    assert [each["in_step"] for each in seen] == [7, 7]
    assert seen[asked]["tokens"] == 1


async def never_ends() -> None:
    await asyncio.Event().wait()


def test_waiting_for_scores_is_given_up() -> None:
    stop = StopRequest()
    threading.Timer(0.1, stop.ask, ["SIGTERM"]).start()
    with pytest.raises(StopRequested, match="SIGTERM"):
        asyncio.run(stop.or_work(never_ends()))
