"""The embedded engine: a transformers model in every trainer process, fed by the same weight stream as any engine.

Rank 0 holds the controller and speaks the `RolloutEngine` protocol; `stream` there enters `serve`, in which all ranks
take part: requests go out, every rank decodes its share, results come back. The other ranks wait in `follow`.
"""

import re
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fipo.parallel.collectives import (
    Arrays,
    broadcast_arrays,
    broadcast_json,
    receive_arrays,
    send_arrays,
)
from megatron_fipo.platform.device import compute_device
from megatron_fipo.rollout.decoding import decode
from megatron_fipo.rollout.engine import (
    GenerationRequest,
    GenerationResult,
    SamplingParameters,
    WeightBucket,
)
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.stop_request import NO_STOP, StopRequest, StopRequested
from megatron_fipo.types import FinishReason

_EXPERT_NAME = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")
_FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


class EmbeddedEngine:
    """A transformers model on every rank, all of which generate.

    Weights come from `load` alone, so that conversion and synchronisation are used on every machine.

    Args:
        model_config: Contents of the model's config.json.
        folder: Model folder, for the architecture's own defaults.
        dtype: Precision of the weights.
        max_batch_sequences: Sequences decoded at once on each rank.
        progress: Told how many responses have ended, as far as this rank's share tells; results come all at once.
        stop: Looked at after every token: a rank that knows of it gives up its share.
    """

    def __init__(
        self,
        model_config: dict[str, Any],
        folder: Path,
        dtype: torch.dtype,
        max_batch_sequences: int,
        progress: Progress = NO_PROGRESS,
        stop: StopRequest = NO_STOP,
    ) -> None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        for key in ("max_position_embeddings", "rope_parameters"):
            if key in model_config and hasattr(config, key):
                setattr(config, key, model_config[key])
        if "rope_theta" in model_config and isinstance(getattr(config, "rope_parameters", None), dict):
            config.rope_parameters["rope_theta"] = model_config["rope_theta"]
        with torch.device(compute_device()):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model.eval().requires_grad_(False)
        self.max_batch_sequences, self._progress, self._stop = max_batch_sequences, progress, stop
        self.policy_version = -1
        # Tied weights appear under each of their names; a stream may send either.
        self._weights = self.model.state_dict()
        self._missing = self._parameter_sizes()
        self._queue: list[GenerationRequest] = []
        self._aborted: list[GenerationResult] = []

    async def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests; rank 0 alone."""
        self._queue.extend(requests)

    async def stream(self) -> AsyncIterator[GenerationResult]:
        """Generate everything queued, all ranks together, and yield the results; rank 0 alone."""
        while self._queue or self._aborted:
            aborted, self._aborted = self._aborted, []
            for result in aborted:
                yield result
            queue, self._queue = self._queue, []
            for result in self.serve(queue) if queue else []:
                yield result

    async def abort(self, request_ids: Collection[str]) -> None:
        """Take queued requests back; none is ever half-way, since `serve` runs to its end."""
        wanted = set(request_ids)
        for request in self._queue:
            if request.request_id in wanted:
                empty = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))
                self._aborted.append(
                    GenerationResult(
                        request_id=request.request_id,
                        token_ids=empty[0],
                        log_probs=empty[1],
                        finish_reason="abort",
                        policy_version=self.policy_version,
                    )
                )
        self._queue = [request for request in self._queue if request.request_id not in wanted]

    @torch.no_grad()
    def load(self, bucket: WeightBucket) -> None:
        """Copy a bucket into this rank's model.

        Raises:
            KeyError: The model has no parameter of that name.
            RuntimeError: A tensor has another shape than the parameter, or the last bucket came and a parameter was
                never sent.
        """
        for name, tensor in bucket.tensors.items():
            parameter, live = self._destination(name)
            # Without this, copy_ would repeat a smaller tensor.
            if live.shape != tensor.shape:
                raise RuntimeError(f"the weight stream has {name} as {list(tensor.shape)}, not {list(live.shape)}")
            live.copy_(tensor)
            self._missing[parameter] = self._missing.get(parameter, 0) - live.numel()
        if bucket.is_last:
            missing = sorted(name for name, count in self._missing.items() if count > 0)
            if missing:
                raise RuntimeError(f"the weight stream lacks {len(missing)} tensors: {missing[:3]}")
            self.policy_version = bucket.policy_version
            self._missing = self._parameter_sizes()

    def _parameter_sizes(self) -> dict[str, int]:
        return {name: parameter.numel() for name, parameter in self.model.named_parameters()}

    def _destination(self, name: str) -> tuple[str, Tensor]:
        """The parameter that a tensor of the stream belongs to, and the part of it that it fills.

        transformers keeps the matrices of all experts of a layer in two stacked parameters, where the checkpoint has
        three matrices an expert.
        """
        expert = _EXPERT_NAME.fullmatch(name)
        if name in self._weights or expert is None:
            return name, self._weights[name]
        number = int(expert["number"])
        if expert["matrix"] == "down":
            parameter = f"{expert['layer']}.down_proj"
            return parameter, self._weights[parameter][number]
        parameter = f"{expert['layer']}.gate_up_proj"
        halves = self._weights[parameter][number].chunk(2)
        return parameter, halves[0] if expert["matrix"] == "gate" else halves[1]

    def serve(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Generate on all ranks; called on rank 0 while the others are in `follow`.

        Returns:
            Results in the order of the requests.

        Raises:
            StopRequested: A rank has given up its share; the others still wait for the next `serve` or `release`.
        """
        results: list[GenerationResult] = []
        for start, stop in _sampling_runs(requests):
            results += self._serve_run(list(requests[start:stop]))
        return results

    def follow(self) -> None:
        """Take part in every `serve` of rank 0 until its `release`; called on every other rank."""
        while (sampling := broadcast_json(None, 0)) is not None:
            sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
            share = self._share(_unpack_requests(broadcast_arrays(None, 0), SamplingParameters(**sampling)))
            try:
                results = self._decode(share, len(share))
            except StopRequested as reason:
                # Rank 0 may not know of it yet.
                send_arrays({"given_up": np.frombuffer(bytearray(str(reason).encode()), dtype=np.uint8)}, 0)
            else:
                send_arrays(_pack_results(results), 0)

    def release(self) -> None:
        """Let the other ranks out of `follow`; called on rank 0."""
        broadcast_json(None, 0)

    def _serve_run(self, requests: list[GenerationRequest]) -> list[GenerationResult]:
        broadcast_json(asdict(requests[0].sampling), 0)
        broadcast_arrays(_pack_requests(requests), 0)
        results: list[GenerationResult] = []
        given_up: StopRequested | None = None
        for rank in range(dist.get_world_size()):
            try:
                results += self._decode(self._share(requests), len(requests)) if rank == 0 else self._receive(rank)
            except StopRequested as reason:
                # What the others send is taken in first.
                given_up = reason
        if given_up is not None:
            raise given_up
        names = [request.request_id for request in requests]
        return [replace(result, request_id=name) for name, result in zip(names, results, strict=True)]

    def _receive(self, rank: int) -> list[GenerationResult]:
        arrays = receive_arrays(rank)
        if "given_up" in arrays:
            raise StopRequested(arrays["given_up"].tobytes().decode())
        return _unpack_results(arrays)

    def _share(self, requests: list[GenerationRequest]) -> list[GenerationRequest]:
        """This rank's part: consecutive requests, so that a prompt's samples mostly stay together."""
        bounds = np.linspace(0, len(requests), dist.get_world_size() + 1).round().astype(int)
        return requests[bounds[dist.get_rank()] : bounds[dist.get_rank() + 1]]

    def _decode(self, requests: list[GenerationRequest], total: int) -> list[GenerationResult]:
        """Generate this rank's share of so many requests.

        Raises:
            StopRequested: A stop was asked for.
        """
        results: list[GenerationResult] = []

        def tell(finished: int) -> None:
            self._progress.advance((len(results) + finished) * total // len(requests), total)
            self._stop.raise_if_asked()

        for first in range(0, len(requests), self.max_batch_sequences):
            batch = requests[first : first + self.max_batch_sequences]
            results += decode(self.model, batch, self.policy_version, tell)
        return results


def _sampling_runs(requests: Sequence[GenerationRequest]) -> list[tuple[int, int]]:
    """Bounds of the runs of consecutive requests with equal sampling parameters."""
    starts = [
        index
        for index in range(len(requests))
        if index == 0 or requests[index].sampling != requests[index - 1].sampling
    ]
    return list(zip(starts, [*starts[1:], len(requests)], strict=True))


def _pack_requests(requests: Sequence[GenerationRequest]) -> Arrays:
    return {
        "lengths": np.array([len(request.prompt_token_ids) for request in requests], dtype=np.int32),
        "token_ids": np.concatenate([request.prompt_token_ids for request in requests]).astype(np.int32),
        "seeds": np.array([request.seed for request in requests], dtype=np.int64),
    }


def _unpack_requests(arrays: Arrays, sampling: SamplingParameters) -> list[GenerationRequest]:
    """Requests as the other ranks need them: results go back by position, so names stay on rank 0."""
    prompts = np.split(arrays["token_ids"], np.cumsum(arrays["lengths"])[:-1])
    return [
        GenerationRequest(prompt_id="", sample_index=index, prompt_token_ids=prompt, seed=int(seed), sampling=sampling)
        for index, (prompt, seed) in enumerate(zip(prompts, arrays["seeds"], strict=True))
    ]


def _pack_results(results: Sequence[GenerationResult]) -> Arrays:
    empty = [np.empty(0)]
    return {
        "lengths": np.array([len(result.token_ids) for result in results], dtype=np.int32),
        "token_ids": np.concatenate([*(r.token_ids for r in results), *empty]).astype(np.int32),
        "log_probs": np.concatenate([*(r.log_probs for r in results), *empty]).astype(np.float32),
        "finish": np.array([_FINISH_REASONS.index(r.finish_reason) for r in results], dtype=np.int32),
        "versions": np.array([r.policy_version for r in results], dtype=np.int32),
    }


def _unpack_results(arrays: Arrays) -> list[GenerationResult]:
    if not len(arrays["lengths"]):
        return []
    bounds = np.cumsum(arrays["lengths"])[:-1]
    tokens, log_probs = np.split(arrays["token_ids"], bounds), np.split(arrays["log_probs"], bounds)
    return [
        GenerationResult(
            request_id="",
            token_ids=tokens[row],
            log_probs=log_probs[row],
            finish_reason=_FINISH_REASONS[int(arrays["finish"][row])],
            policy_version=int(arrays["versions"][row]),
        )
        for row in range(len(tokens))
    ]
