"""Log-probabilities from hidden states under every vocabulary split, against torch in float64."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor.log_probs import VocabularyShard, linear_log_probs
from tests.distributed_helpers import run_distributed
from tests.tool_modules import load_tool

pytestmark = pytest.mark.distributed

BENCHMARK = load_tool("benchmark_log_probs")


@dataclass(frozen=True)
class Case:
    num_tokens: int = 37
    vocab_size: int = 301
    hidden_size: int = 16
    # Every rank has a multiple of so many rows, filled up with padding.
    row_multiple: int = 1
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    chunk_tokens: int = 1024
    recompute_logits: bool = False


CASES = {
    "all at once": Case(),
    "one token at a time": Case(chunk_tokens=1),
    "three tokens at a time": Case(chunk_tokens=3),
    "logits computed again": Case(recompute_logits=True),
    "logits computed again, three at a time": Case(recompute_logits=True, chunk_tokens=3),
    "warm": Case(temperature=1.7),
    "cold, in chunks": Case(temperature=0.3, chunk_tokens=3),
    "vocabulary of five": Case(vocab_size=5),
    "vocabulary that divides evenly": Case(vocab_size=256),
    "no tokens": Case(num_tokens=0),
    "no tokens, logits computed again": Case(num_tokens=0, recompute_logits=True),
    "float64": Case(dtype=torch.float64, temperature=0.7, chunk_tokens=10),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16, logits computed again": Case(dtype=torch.bfloat16, recompute_logits=True),
    "bfloat16, logits computed again in chunks": Case(dtype=torch.bfloat16, recompute_logits=True, chunk_tokens=10),
}

# Largest error of a log-probability or entropy at temperature 1, and ‖a − b‖ / ‖b‖ of a gradient. In bfloat16 the
# logits themselves are rounded, by up to 2⁻⁹ of their size, which goes to 20.
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (4e-6, 1e-6), torch.bfloat16: (8e-2, 1e-2)}


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Inputs(
        hidden=draw(case.num_tokens, case.hidden_size).to(case.dtype),
        weight=draw(case.vocab_size, case.hidden_size).to(case.dtype),
        targets=torch.randint(case.vocab_size, (case.num_tokens,), generator=generator),
        upstream=draw(case.num_tokens),
    )


def shard_of(weight: Tensor, row_multiple: int = 1) -> tuple[Tensor, VocabularyShard]:
    """This rank's rows of the output matrix; padding rows hold large numbers, which must not matter."""
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = math.ceil(len(weight) / (size * row_multiple)) * row_multiple
    padded = torch.full((rows * size, weight.shape[1]), 100.0, dtype=weight.dtype)
    padded[: len(weight)] = weight
    shard = VocabularyShard(start=rank * rows, vocab_size=len(weight), group=dist.group.WORLD)
    return padded[rank * rows : (rank + 1) * rows].clone(), shard


def run_case(case: Case) -> dict[str, Tensor]:
    inputs = make_inputs(case)
    weight, shard = shard_of(inputs.weight)
    hidden, weight = inputs.hidden.clone().requires_grad_(), weight.requires_grad_()
    options = {
        "temperature": case.temperature,
        "chunk_tokens": case.chunk_tokens,
        "recompute_logits": case.recompute_logits,
    }
    log_probs, entropy = linear_log_probs(hidden, weight, inputs.targets, shard, **options)
    first = torch.autograd.grad(log_probs, (hidden, weight), inputs.upstream, retain_graph=True)
    second = torch.autograd.grad(log_probs, (hidden, weight), inputs.upstream)
    with torch.no_grad():
        without_gradient, _ = linear_log_probs(hidden, weight, inputs.targets, shard, **options)
    assert not entropy.requires_grad
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy,
        "without_gradient": without_gradient,
        "grad_hidden": first[0],
        "grad_weight": first[1],
        "second_grad_hidden": second[0],
        "second_grad_weight": second[1],
    }


SLOPE_CASES = {
    "every row real": Case(num_tokens=7, vocab_size=12, hidden_size=2, temperature=0.7),
    "padding behind the last real row": Case(
        num_tokens=7, vocab_size=5, hidden_size=2, row_multiple=2, temperature=1.7
    ),
    "all real rows on the first rank": Case(num_tokens=7, vocab_size=5, hidden_size=2, row_multiple=6, temperature=0.7),
}
SLOPE_OPTIONS = [
    {"chunk_tokens": chunk, "recompute_logits": recompute} for chunk in (2, 1024) for recompute in (False, True)
]
# Of the largest slope.
SLOPE_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Slopes:
    """Derivatives of every token's log-probability by every entry of the hidden states and of all ranks' rows.

    Attributes:
        hidden, weight: [n, n, h] and [n, W · rows, h] by finite differences.
        analytic_hidden: For each of SLOPE_OPTIONS, [n, n, h], this rank's part of a sum.
        analytic_weight: For each of SLOPE_OPTIONS, [n, rows, h], this rank's rows.
    """

    hidden: Tensor
    weight: Tensor
    analytic_hidden: list[Tensor]
    analytic_weight: list[Tensor]


def finite_difference(function: Callable[[float], Tensor], step: float = 2e-3) -> Tensor:
    """Slope at 0 of a function of one number by central differences over one and two steps, to fourth order."""
    near, far = function(step) - function(-step), function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def slopes(case: Case) -> Slopes:
    inputs = make_inputs(replace(case, dtype=torch.float64))
    weight, shard = shard_of(inputs.weight, case.row_multiple)
    num_tokens, hidden_size = inputs.hidden.shape

    def log_probs(hidden: Tensor, rows: Tensor, **options: Any) -> Tensor:
        targets = inputs.targets.repeat(len(hidden) // num_tokens)
        return linear_log_probs(hidden, rows, targets, shard, temperature=case.temperature, **options)[0]

    def by_hidden(amount: float) -> Tensor:
        """All tokens' log-probabilities, with one entry of the hidden states moved at a time: [n, n · h]."""
        moves = amount * torch.eye(inputs.hidden.numel(), dtype=torch.float64).view(-1, num_tokens, hidden_size)
        return log_probs((inputs.hidden + moves).view(-1, hidden_size), weight).view(-1, num_tokens).t()

    def by_weight(amount: float) -> Tensor:
        """The same with one entry of one rank's rows: [n, W · rows · h]."""
        columns = []
        for rank in range(dist.get_world_size()):
            for entry in range(weight.numel()):
                rows = weight.clone()
                rows.view(-1)[entry] += amount if rank == dist.get_rank() else 0.0
                columns.append(log_probs(inputs.hidden, rows))
        return torch.stack(columns, dim=1)

    analytic: list[list[Tensor]] = [[], []]
    for options in SLOPE_OPTIONS:
        leaves = inputs.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        gradients = [
            torch.autograd.grad(log_probs(*leaves, **options)[token], leaves) for token in range(case.num_tokens)
        ]
        for kept, parts in zip(analytic, zip(*gradients, strict=True), strict=True):
            kept.append(torch.stack(parts))
    return Slopes(
        hidden=finite_difference(by_hidden).unflatten(1, (-1, hidden_size)),
        weight=finite_difference(by_weight).unflatten(1, (-1, hidden_size)),
        analytic_hidden=analytic[0],
        analytic_weight=analytic[1],
    )


def run_all() -> tuple[dict[str, dict[str, Tensor]], dict[str, Slopes]]:
    # Memory that was never written reads as NaN.
    torch.use_deterministic_algorithms(True)
    cases = {name: run_case(case) for name, case in CASES.items()}
    return cases, {name: slopes(case) for name, case in SLOPE_CASES.items()}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="TP {}".format)
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    return run_distributed(run_all, request.param)


def expected(case: Case) -> dict[str, Tensor]:
    inputs = make_inputs(case)
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    log_softmax = (hidden @ weight.t() / case.temperature).log_softmax(dim=-1)
    log_probs = log_softmax.gather(1, inputs.targets[:, None]).squeeze(1)
    grad_hidden, grad_weight = torch.autograd.grad(log_probs, (hidden, weight), inputs.upstream)
    return {
        "log_probs": log_probs.detach(),
        "entropy": -(log_softmax.exp() * log_softmax).sum(dim=-1).detach(),
        "grad_hidden": grad_hidden,
        "grad_weight": grad_weight,
    }


def all_expected() -> dict[str, dict[str, Tensor]]:
    return {name: expected(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Tensor]]:
    return run_distributed(all_expected, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_equal_log_softmax(ranks, references, name):
    case, parts, reference = CASES[name], [rank[0][name] for rank in ranks], references[name]
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    value_tolerance /= min(case.temperature, 1.0)
    for part in parts:
        for key in ("log_probs", "entropy"):
            assert part[key].dtype == torch.float64
            assert torch.equal(part[key], parts[0][key]), "ranks disagree"
            assert part[key].shape == reference[key].shape
            error = (part[key] - reference[key]).abs().max().item() if case.num_tokens else 0.0
            assert error <= value_tolerance, (key, error)
        assert torch.equal(part["log_probs"], part["without_gradient"])
    for which in ("", "second_"):
        grad_hidden = torch.stack([part[f"{which}grad_hidden"].double() for part in parts]).sum(0)
        grad_weight = torch.cat([part[f"{which}grad_weight"].double() for part in parts])
        assert not grad_weight[case.vocab_size :].any(), "padding rows have a gradient"
        gradients = {"grad_hidden": grad_hidden, "grad_weight": grad_weight[: case.vocab_size]}
        for key, gradient in gradients.items():
            assert parts[0][key].dtype == case.dtype
            difference = (gradient - reference[key]).norm()
            assert difference <= gradient_tolerance * reference[key].norm(), (which + key, float(difference))


@pytest.mark.parametrize(
    ("kept", "again"),
    [("all at once", "logits computed again"), ("bfloat16", "bfloat16, logits computed again")],
)
def test_computing_logits_again_changes_nothing(ranks, kept, again):
    for rank in ranks:
        for key, value in rank[0][kept].items():
            assert torch.equal(rank[0][again][key], value), key


@pytest.mark.parametrize("name", SLOPE_CASES)
def test_every_slope_equals_a_finite_difference(ranks, name):
    """For every entry of every rank's rows, padding included, whether a token's target lies there or elsewhere."""
    case, parts = SLOPE_CASES[name], [rank[1][name] for rank in ranks]
    measured = parts[0]
    real = measured.weight[:, : case.vocab_size]
    assert not measured.weight[:, case.vocab_size :].any()
    felt = real.abs().amax(dim=2) / real.abs().max()
    assert felt.min() > 100 * SLOPE_TOLERANCE, "every token feels every row, on whichever rank"
    for number, options in enumerate(SLOPE_OPTIONS):
        by_hidden = torch.stack([part.analytic_hidden[number] for part in parts]).sum(0)
        by_weight = torch.cat([part.analytic_weight[number] for part in parts], dim=1)
        for analytic, slope in ((by_hidden, measured.hidden), (by_weight, measured.weight)):
            assert analytic.dtype == torch.float64
            error = (analytic - slope).abs().max() / slope.abs().max()
            assert error <= SLOPE_TOLERANCE, (options, float(error))


def test_the_slopes_reach_every_kind_of_shard():
    """Over the tensor-parallel sizes: shards with a token's target and without, partly padding, and padding alone."""
    kinds = set()
    for size, case in itertools.product((1, 2, 4), SLOPE_CASES.values()):
        rows = math.ceil(case.vocab_size / (size * case.row_multiple)) * case.row_multiple
        for start in range(0, rows * size, rows):
            targets = make_inputs(case).targets
            here = (targets >= start) & (targets < start + rows)
            num_real = min(max(case.vocab_size - start, 0), rows)
            kinds.add((bool(here.any()), bool((~here).any()), 0 if num_real == 0 else 1 if num_real < rows else 2))
    some, all_of_them = (True, True), (True, False)
    assert {(*some, 2), (*some, 1), (False, True, 0), (*all_of_them, 1), (*all_of_them, 2)} <= kinds


def copies_of_the_logits(dtypes: list[torch.dtype], num_tokens: int, chunks: list[int]) -> list[tuple[Any, ...]]:
    """Working memory of a forward and backward pass, and of a forward pass without gradient, in copies."""
    measured = []
    for dtype, chunk in itertools.product(dtypes, chunks):
        problem = BENCHMARK.make_problem(num_tokens, 20_000, 16, dtype)
        for name, side in BENCHMARK.make_sides(chunk).items():
            if name in ("megatron-fipo", "megatron-fipo, logits computed again"):
                working = BENCHMARK.working_bytes(side, problem)
                with torch.no_grad():
                    without = BENCHMARK.measure_memory(lambda side=side, problem=problem: side(problem)).peak
                copy = problem.logits_bytes
                measured.append((dtype, chunk, name, working / copy, without / copy))
    return measured


def test_memory_beyond_one_copy_of_the_logits():
    dtypes, num_tokens, chunks = [torch.float32, torch.bfloat16], 1024, [256, 1024]
    (measured,) = run_distributed(copies_of_the_logits, 1, dtypes, num_tokens, chunks)
    assert len(measured) == 8
    for dtype, chunk, name, working, without_gradient in measured:
        print(f"{dtype}, chunks of {chunk}, {name}: {working:.3f}, without gradient {without_gradient:.3f} copies")
        part = chunk / num_tokens
        least = part if "again" in name else 1.0
        assert least <= working <= least + 0.1, (dtype, chunk, name)
        assert part <= without_gradient <= part + 0.1, (dtype, chunk, name)
