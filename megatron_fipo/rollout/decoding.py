"""Batched sampling from a transformers causal language model, repeatable sample by sample.

Every sample draws from its own stream of uniform numbers, by inversion of the cumulative distribution, so that its
tokens do not depend on which samples share its batch (beyond rounding of the logits).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from megatron_fipo.rollout.engine import GenerationRequest, GenerationResult, SamplingParameters

# Finished rows are dropped from the batch once they are this part of it.
_COMPACT_FRACTION = 0.25


@dataclass(slots=True)
class _Batch:
    """Rows still decoding: n rows, L positions so far.

    Attributes:
        rows: [n] int64 index of every row's request.
        mask: [n, L] int64, 0 on left padding.
        next_positions: [n] int64 position of the next token.
        cache: Keys and values.
        last_tokens: [n] int64.
        active: [n] bool.
    """

    rows: Tensor
    mask: Tensor
    next_positions: Tensor
    cache: DynamicCache
    last_tokens: Tensor
    active: Tensor

    def keep(self, index: Tensor) -> None:
        """Drop all rows but those of `index`."""
        self.cache.batch_select_indices(index)
        self.rows, self.mask = self.rows[index], self.mask[index]
        self.next_positions, self.last_tokens = self.next_positions[index], self.last_tokens[index]
        self.active = self.active[index]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    requests: Sequence[GenerationRequest],
    policy_version: int,
    on_finished: Callable[[int], None] | None = None,
) -> list[GenerationResult]:
    """Generate every request in one batch, all with the same sampling parameters.

    Args:
        model: In evaluation mode.
        requests: At least one; prompts that occur several times are read once.
        policy_version: Version of the model's weights.
        on_finished: Called after every token with the number of requests that have ended.

    Returns:
        Results in the order of the requests.
    """
    sampling = requests[0].sampling
    count, limit = len(requests), sampling.max_tokens
    device = model.device
    uniforms = _uniforms(requests, limit).to(device)
    stop = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
    tokens = torch.zeros(count, limit, dtype=torch.int64, device=device)
    log_probs = torch.zeros(count, limit, dtype=torch.float32, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    stopped = torch.zeros(count, dtype=torch.bool, device=device)
    batch, logits = _prefill(model, requests)
    for step in range(limit):
        chosen, chosen_log_probs = _draw(logits, uniforms[batch.rows, step], sampling)
        live = batch.rows[batch.active]
        tokens[live, step] = chosen[batch.active]
        log_probs[live, step] = chosen_log_probs[batch.active]
        lengths[live] = step + 1
        ended = batch.active & torch.isin(chosen, stop)
        stopped[batch.rows[ended]] = True
        batch.active &= ~ended
        batch.last_tokens = chosen
        num_active = int(batch.active.sum())
        if on_finished is not None:
            on_finished(count - num_active)
        if num_active == 0 or step + 1 == limit:
            break
        if num_active <= (1 - _COMPACT_FRACTION) * len(batch.active):
            batch.keep(batch.active.nonzero().squeeze(1))
        logits = _advance(model, batch)
    return _results(requests, tokens.cpu(), log_probs.cpu(), lengths.tolist(), stopped.tolist(), policy_version)


def _uniforms(requests: Sequence[GenerationRequest], limit: int) -> Tensor:
    """[n, limit] float64 in [0, 1), a stream of its own for every request."""
    streams = []
    for request in requests:
        generator = torch.Generator().manual_seed(request.seed)
        streams.append(torch.rand(limit, dtype=torch.float64, generator=generator))
    return torch.stack(streams)


def _prefill(model: PreTrainedModel, requests: Sequence[GenerationRequest]) -> tuple[_Batch, Tensor]:
    """Read every distinct prompt once and copy its keys and values to all its samples."""
    places: dict[bytes, int] = {}
    prompts: list[np.ndarray] = []
    place_of_row = []
    for request in requests:
        key = request.prompt_token_ids.tobytes()
        if key not in places:
            places[key] = len(prompts)
            prompts.append(request.prompt_token_ids)
        place_of_row.append(places[key])
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt).long()
        mask[row, longest - len(prompt) :] = 1
    device = model.device
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    index = torch.tensor(place_of_row, device=device)
    cache.batch_select_indices(index)
    batch = _Batch(
        rows=torch.arange(len(requests), device=device),
        mask=mask[index],
        next_positions=mask.sum(dim=1)[index],
        cache=cache,
        last_tokens=ids[index, -1],
        active=torch.ones(len(requests), dtype=torch.bool, device=device),
    )
    return batch, output.logits[index, -1]


def _advance(model: PreTrainedModel, batch: _Batch) -> Tensor:
    """Logits [n, V] of the next token."""
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.mask), 1)], dim=1)
    output = model(
        input_ids=batch.last_tokens[:, None],
        attention_mask=batch.mask,
        position_ids=batch.next_positions[:, None],
        past_key_values=batch.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    batch.next_positions = batch.next_positions + 1
    return output.logits[:, -1]


def _draw(logits: Tensor, uniforms: Tensor, sampling: SamplingParameters) -> tuple[Tensor, Tensor]:
    """A token for each row [n] and its log-probability [n] float32 at sampling temperature."""
    log_probs = (logits.float() / sampling.temperature).log_softmax(dim=-1)
    if sampling.greedy:
        chosen = log_probs.argmax(dim=-1)
    else:
        probabilities = log_probs.double().exp()
        if sampling.top_p < 1.0:
            probabilities = _nucleus(probabilities, sampling.top_p)
        cumulative = probabilities.cumsum(dim=-1)
        thresholds = uniforms * cumulative[:, -1]
        chosen = torch.searchsorted(cumulative, thresholds[:, None], right=True).squeeze(1)
        chosen = chosen.clamp(max=log_probs.shape[-1] - 1)
    return chosen, log_probs.gather(1, chosen[:, None]).squeeze(1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities with everything outside the smallest set of mass ≥ top_p set to 0."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(1, order, torch.where(before < top_p, ordered, 0.0))


def _results(
    requests: Sequence[GenerationRequest],
    tokens: Tensor,
    log_probs: Tensor,
    lengths: list[int],
    stopped: list[bool],
    policy_version: int,
) -> list[GenerationResult]:
    return [
        GenerationResult(
            request_id=request.request_id,
            token_ids=tokens[row, : lengths[row]].numpy().astype(np.int32),
            log_probs=log_probs[row, : lengths[row]].numpy().copy(),
            finish_reason="stop" if stopped[row] else "length",
            policy_version=policy_version,
        )
        for row, request in enumerate(requests)
    ]
