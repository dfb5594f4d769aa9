"""Random mini-batches that reach every rule of the loss, and what the package makes of them."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_fipo.algorithms.policy_loss import LossInputs, LossOutput, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.types import merge_metrics, render_metrics
from tests.unit.algorithms.oracle import MiniBatch, Response

SPREADS = (0.0, 0.05, 0.3, 1.5, 8.0)
"""Standard deviations of Δ within a response; 0.05 is that of ordinary training."""


def response(shift: Sequence[float], advantage: float | Sequence[float], **fields: np.ndarray) -> Response:
    """A response whose log-ratios are `shift`, to the bit: multiples of 1/4 (as 20) and sums with 0 stay exact."""
    moved = np.asarray(shift, dtype=np.float64)
    return Response(
        log_probs=moved,
        old_log_probs=np.zeros(len(moved)),
        advantages=np.broadcast_to(np.asarray(advantage, dtype=np.float64), moved.shape).copy(),
        **fields,
    )


def exact_log_ratio(ratio: float, beyond: float = 0.0) -> float:
    """A Δ with exp(Δ) = `ratio` to the bit; or, towards `beyond` (±inf), the first Δ whose exponential is not."""
    found = math.log(ratio)
    while float(torch.tensor([found], dtype=torch.float64).exp()) == ratio and beyond:
        found = math.nextafter(found, beyond)
    exponentials = {float(torch.tensor([found], dtype=torch.float64).exp()), float(np.exp(found))}
    assert exponentials == {ratio} if not beyond else ratio not in exponentials, f"no Δ for a ratio of {ratio}"
    return found


def random_mini_batch(seed: int, grid: float = 0.0) -> list[list[Response]]:
    """One to four micro-batches of one to five responses, ragged, some with masked gaps.

    Args:
        seed: What to draw from.
        grid: What log-probabilities are rounded to multiples of, so that float32 holds their differences exactly.
    """
    draws = np.random.default_rng(seed)
    micro_batches = []
    for _ in range(draws.integers(1, 5)):
        to_be_dropped = draws.random() < 0.05
        count = draws.integers(1, 6)
        micro_batches.append([_random_response(draws, to_be_dropped, grid) for _ in range(count)])
    return micro_batches


def random_responses(count: int, seed: int) -> list[Response]:
    """Responses as they occur in random mini-batches."""
    draws = np.random.default_rng(seed)
    return [_random_response(draws, to_be_dropped=False, grid=0.0) for _ in range(count)]


def _random_response(draws: np.random.Generator, to_be_dropped: bool, grid: float) -> Response:
    length = int(draws.choice([1, 2, draws.integers(3, 40), draws.integers(40, 150)], p=[0.1, 0.1, 0.7, 0.1]))
    shift = draws.standard_normal(length) * draws.choice(SPREADS)
    if draws.random() < 0.3:
        # Few tokens anywhere in the range, as when a sampled token was next to impossible for one of the policies.
        places = draws.integers(0, length, draws.integers(1, 4))
        shift[places] = draws.uniform(-30, 30, len(places))
    advantages = np.full(length, draws.choice([0.0, 1.0, -1.0], p=[0.1, 0.45, 0.45]) * draws.exponential())
    if draws.random() < 0.1:
        advantages = draws.standard_normal(length)
    if to_be_dropped:
        advantages = -np.abs(advantages) - 0.1
        shift = np.concatenate([shift, draws.uniform(3, 30, 2)])
        advantages = np.append(advantages, [-1.0, -1.0])
        length += 2
    old = -draws.exponential(1.0, length) - np.maximum(shift, 0)
    new, rollout = old + shift, old + 0.01 * draws.standard_normal(length)
    if grid:
        old, new, rollout = (np.round(values / grid) * grid for values in (old, new, rollout))
        advantages = advantages.astype(np.float32).astype(np.float64)
    gaps = draws.integers(1, 30, length) * (draws.random(length) < 0.05) * (draws.random() < 0.3)
    return Response(
        log_probs=new,
        old_log_probs=old,
        advantages=advantages,
        positions=np.arange(length) + np.cumsum(gaps),
        rollout_log_probs=rollout,
        entropy=draws.exponential(0.3, length),
    )


def pack(
    responses: Sequence[Response],
    *,
    prompt: int = 2,
    padding: int = 1,
    fill: float = math.nan,
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    """One micro-batch: each response behind `prompt` tokens and before `padding`, those and its gaps full of `fill`."""
    lengths = [prompt + (int(one.places[-1]) + 1 if len(one.places) else 0) + padding for one in responses]
    starts = np.cumsum([0, *lengths])
    places = np.concatenate([start + prompt + one.places for start, one in zip(starts, responses, strict=False)])

    def column(name: str) -> torch.Tensor | None:
        if getattr(responses[0], name) is None:
            return None
        values = np.full(starts[-1], fill)
        values[places] = np.concatenate([getattr(one, name) for one in responses])
        return torch.from_numpy(values).to(dtype)

    mask = torch.zeros(int(starts[-1]), dtype=torch.bool)
    mask[torch.from_numpy(places)] = True
    columns = {name: column(name) for name in ("log_probs", "old_log_probs", "advantages")}
    columns |= {name: column(name) for name in ("rollout_log_probs", "entropy")}
    columns["log_probs"].requires_grad_()
    return LossInputs(
        **columns,
        response_mask=mask,
        response_lengths=torch.tensor([len(one.log_probs) for one in responses]),
        layout=PackLayout(tuple(lengths)),
        sequence_numbers=torch.arange(len(responses)),
    )


def update(
    micro_batches: Sequence[LossInputs], config: AlgorithmConfig
) -> tuple[float, np.ndarray, dict[str, float], list[LossOutput]]:
    """Loss, gradient on response tokens, metrics and outputs of micro-batches taken together as one update."""
    outputs = [policy_loss(inputs, config) for inputs in micro_batches]
    denominator = sum(output.denominator for output in outputs)
    total = sum(output.numerator for output in outputs) / torch.where(denominator > 0, denominator, 1)
    gradients = torch.autograd.grad(total, [inputs.log_probs for inputs in micro_batches])
    for inputs, gradient in zip(micro_batches, gradients, strict=True):
        assert not gradient[~inputs.response_mask].any()
    metrics = render_metrics(merge_metrics([output.metrics for output in outputs]))
    return float(total.detach()), on_response_tokens(micro_batches, gradients), metrics, outputs


def on_response_tokens(micro_batches: Sequence[LossInputs], values: Sequence[torch.Tensor]) -> np.ndarray:
    """What [t] tensors, one a micro-batch, hold on response tokens."""
    chosen = [value[inputs.response_mask] for inputs, value in zip(micro_batches, values, strict=True)]
    return torch.cat(chosen).numpy()


def assert_same(
    expected: MiniBatch,
    *,
    loss: float,
    metrics: dict[str, float],
    relative: float,
    absolute: float,
    **tokens: np.ndarray,
) -> None:
    """Compare all that was made of a mini-batch with the oracle.

    Args:
        expected: The oracle's.
        loss: Of the mini-batch.
        metrics: Rendered.
        relative: Tolerance.
        absolute: Tolerance.
        tokens: `gradient`, `future_kl`, `influence_weights` and `kept_mask` on all response tokens.
    """

    def same(what: str, actual: object, wanted: object) -> None:
        np.testing.assert_allclose(actual, wanted, rtol=relative, atol=absolute, err_msg=what)

    def rules(name: str) -> np.ndarray:
        return np.concatenate([getattr(terms, name) for terms in expected.terms])

    same("loss", loss, expected.loss)
    same("gradient", tokens["gradient"], np.concatenate(expected.gradients))
    same("Future-KL", tokens["future_kl"], rules("future_kl"))
    same("influence weights", tokens["influence_weights"], rules("weights"))
    kept = [np.full(len(terms.losses), not terms.dropped) for terms in expected.terms]
    assert np.array_equal(tokens["kept_mask"], np.concatenate(kept))
    assert metrics.keys() == expected.metrics.keys()
    keys = sorted(metrics)
    same(f"metrics {keys}", [metrics[key] for key in keys], [expected.metrics[key] for key in keys])
