"""Log-probabilities and losses in float64, from hidden states to both gradients, cut in every way: the same numbers.

Between the model's last layer and the optimizer nothing is left out but the reduction of gradients, which megatron-core
does in float32: batch → packs → this rank's tokens → schedule → log-probabilities → loss → gradients. Two references
stand beside it: the same on one rank in one pack, and `log_softmax` of all logits. Float32 rounding cannot hide what is
wrong by more than 1e-12 here.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import pytest
import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_fipo.actor.forward import ActorForward, LossFunction, Scores
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.algorithms.policy_loss import LossInputs, LossOutput, policy_loss
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig, GmpoConfig, GrpoConfig, GspoConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.parallel.context import ParallelContext, build_parallel_context, destroy_parallel_context
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.platform.device import compute_device
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import random_batch
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.distributed

HIDDEN, TEMPERATURE = 8, 0.7
TOLERANCE = 1e-12
BATCH = random_batch([30, 9, 41, 17, 25, 6, 33, 22, 14, 38, 3, 27], seed=3)

ALGORITHMS: dict[str, AlgorithmConfig] = {
    "FIPO, 32B": FipoConfig.preset("official-32b", aggregation="token_mean"),
    "FIPO, 7B, with drops": FipoConfig.preset(
        "official-7b", aggregation="token_mean", dual_clip=1.5, safety_threshold=1.3
    ),
    "FIPO, self-normalised": FipoConfig.preset("official-7b", aggregation="token_mean", self_normalize=True),
    "DAPO": DapoConfig(),
    "GRPO": GrpoConfig(),
    "GSPO": GspoConfig(clip_low=0.02, clip_high=0.02),
    "GMPO": GmpoConfig(),
}

TP2, TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
SP, CP2 = {"sequence_parallel": True}, {"context_parallel_size": 2}


@dataclass(frozen=True)
class Grid:
    """How to cut; packs hold at most `max_tokens`."""

    sizes: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 96
    chunk_tokens: int = 1024
    recompute_logits: bool = False


GRIDS: dict[int, dict[str, Grid]] = {
    1: {
        "one rank": Grid(max_tokens=1024),
        "one rank, small packs": Grid(max_tokens=48, chunk_tokens=5, recompute_logits=True),
    },
    4: {
        "DP 4": Grid(),
        "CP 2 × DP 2": Grid(CP2, chunk_tokens=7),
        "TP 2 × DP 2": Grid(TP2, recompute_logits=True),
        "TP 2 + SP × DP 2": Grid(TP2 | SP, max_tokens=48),
        "TP 2 × CP 2": Grid(TP2 | CP2, chunk_tokens=7, recompute_logits=True),
        "TP 2 + SP × CP 2": Grid(TP2 | SP | CP2, max_tokens=1024),
        "TP 4": Grid(TP4, chunk_tokens=5),
        "TP 4 + SP": Grid(TP4 | SP, recompute_logits=True),
    },
    8: {"TP 4 × CP 2": Grid(TP4 | CP2, chunk_tokens=11)},
}


@dataclass(frozen=True)
class Problem:
    """Of every sequence: hidden states [L, h] and, at positions that predict, the old log-probabilities [L]."""

    hidden: list[Tensor]
    old_log_probs: list[Tensor]
    weight: Tensor


@functools.cache
def problem() -> Problem:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = draw(VOCAB_SIZE, HIDDEN)
    hidden = [draw(length, HIDDEN) for length in BATCH.sequence_lengths.tolist()]
    old = []
    for number, states in enumerate(hidden):
        # Sequences of small moves and of large ones, some of them past the dual clip.
        moves = draw(len(states)) * (0.05 if number % 3 else 0.4)
        old.append(log_softmax_at_targets(states, weight, number) - moves)
    return Problem(hidden, old, weight)


def log_softmax_at_targets(hidden: Tensor, weight: Tensor, number: int) -> Tensor:
    """Log-probability of every next token of a sequence; 0 for the last one, which has none."""
    start, stop = BATCH.sequence_starts[number : number + 2]
    targets = torch.from_numpy(BATCH.token_ids[start + 1 : stop]).long()
    log_softmax = (hidden[:-1] @ weight.t() / TEMPERATURE).log_softmax(dim=-1)
    return torch.cat([log_softmax.gather(1, targets[:, None]).squeeze(1), hidden.new_zeros(1)])


@dataclass(frozen=True)
class Outcome:
    """Loss Σ numerators / Σ denominators, its gradients by the hidden states of every sequence and by the output
    matrix, and how many sequences were dropped."""

    loss: float
    grad_hidden: list[Tensor]
    grad_weight: Tensor
    dropped: float


def dropped_sequences(outputs: list[LossOutput]) -> Tensor:
    return sum(
        (
            output.metrics["fipo/dropped_sequences"].total
            for output in outputs
            if "fipo/dropped_sequences" in output.metrics
        ),
        torch.zeros([], dtype=torch.float64),
    )


def by_log_softmax(algorithm: AlgorithmConfig) -> Outcome:
    """All sequences end to end on one rank, with all logits."""
    given = problem()
    leaves = [*(states.clone().requires_grad_() for states in given.hidden), given.weight.clone().requires_grad_()]
    *hidden, weight = leaves
    mask = torch.from_numpy(BATCH.response_mask)
    lengths = BATCH.sequence_lengths.tolist()
    shifted = torch.cat([torch.cat([part[1:], part.new_zeros(1)]) for part in mask.split(lengths)])
    output = policy_loss(
        LossInputs(
            log_probs=torch.cat(
                [log_softmax_at_targets(states, weight, number) for number, states in enumerate(hidden)]
            ),
            old_log_probs=torch.cat(given.old_log_probs),
            advantages=torch.from_numpy(BATCH.advantages).repeat_interleave(torch.tensor(lengths)),
            response_mask=shifted,
            response_lengths=torch.stack([part.sum() for part in shifted.split(lengths)]),
            layout=PackLayout(tuple(lengths)),
        ),
        algorithm,
    )
    loss = output.numerator / output.denominator
    *grad_hidden, grad_weight = torch.autograd.grad(loss, leaves)
    return Outcome(float(loss.detach()), grad_hidden, grad_weight, float(dropped_sequences([output])))


class LastLayer(torch.nn.Module):
    """Stands where a model would: its hidden states are leaves, one for each micro-batch, and so is its matrix."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, context: ParallelContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        rows = math.ceil(VOCAB_SIZE / context.tp_size / 8) * 8
        padded = torch.full((rows * context.tp_size, HIDDEN), 100.0, dtype=torch.float64)
        padded[:VOCAB_SIZE] = problem().weight
        self.weight = padded.split(rows)[context.tp_rank].clone().requires_grad_()
        self.hidden: list[tuple[MicroBatch, Tensor]] = []

    def set_input_tensor(self, _: Any) -> None:
        """The schedule offers what an earlier stage would have sent."""

    def forward(
        self, *, output_processor: Callable[..., Scores], output_processor_context: MicroBatch, **_: Any
    ) -> Any:
        states = on_this_rank(output_processor_context, problem().hidden)[:, None]
        if self.config.sequence_parallel:
            states = states.chunk(self.context.tp_size)[self.context.tp_rank]
        leaf = states.clone().requires_grad_()
        self.hidden.append((output_processor_context, leaf))
        return output_processor(
            hidden_states=leaf, output_layer=None, output_weight=self.weight, context=output_processor_context
        )


def on_this_rank(micro_batch: MicroBatch, per_sequence: list[Tensor]) -> Tensor:
    """Values of a micro-batch's sequences at this rank's positions, NaN in padding."""
    layout = micro_batch.layout
    whole = per_sequence[0].new_full((layout.num_tokens, *per_sequence[0].shape[1:]), math.nan)
    for place, number in enumerate(micro_batch.sequences):
        first = int(layout.cu_seqlens[place])
        whole[first : first + len(per_sequence[number])] = per_sequence[number]
    return layout.shard(whole)


@dataclass(frozen=True)
class RankOutcome:
    """What one rank has of an outcome; its hidden states' gradients by micro-batch."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    loss: float
    dropped: float
    grad_hidden: list[tuple[PackLayout, tuple[int, ...], Tensor]]
    grad_weight: Tensor


def run_grid(grid: Grid, algorithms: dict[str, AlgorithmConfig]) -> dict[str, RankOutcome]:
    parallelism = ParallelismConfig(**{"max_tokens_per_micro_batch": grid.max_tokens, **grid.sizes})
    context = build_parallel_context(parallelism, seed=0)
    try:
        batch = BATCH if context.rank == 0 else None
        (micro_batches,) = shard_micro_batches(batch, packing_rules(parallelism), context, compute_device())
        for micro_batch in micro_batches:
            micro_batch.old_log_probs = on_this_rank(micro_batch, problem().old_log_probs)
        return {name: run_algorithm(algorithm, grid, context, micro_batches) for name, algorithm in algorithms.items()}
    finally:
        destroy_parallel_context()


def run_algorithm(
    algorithm: AlgorithmConfig, grid: Grid, context: ParallelContext, micro_batches: list[MicroBatch]
) -> RankOutcome:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=context.tp_size,
        tensor_model_parallel_size=context.tp_size,
        sequence_parallel=bool(grid.sizes.get("sequence_parallel")),
        calculate_per_token_loss=True,
    )
    model = ModelConfig(
        path=Path("unused"), log_prob_chunk_tokens=grid.chunk_tokens, recompute_logits=grid.recompute_logits
    )
    layer = LastLayer(config, context)
    forward = ActorForward([layer], config, model, context, VOCAB_SIZE, TEMPERATURE)
    outputs: list[LossOutput] = []

    def loss_function(micro_batch: MicroBatch) -> LossFunction:
        def loss(scores: Scores) -> tuple[Tensor, Tensor, None]:
            assert micro_batch.old_log_probs is not None
            outputs.append(
                policy_loss(
                    LossInputs(
                        log_probs=scores["log_probs"],
                        old_log_probs=micro_batch.old_log_probs,
                        advantages=micro_batch.advantages,
                        response_mask=micro_batch.response_mask,
                        response_lengths=micro_batch.response_lengths,
                        layout=micro_batch.layout,
                    ),
                    algorithm,
                    context.cp_group,
                )
            )
            return outputs[-1].numerator, torch.zeros([], dtype=torch.int), None

        return loss

    forward.run(micro_batches, loss_function, forward_only=False)
    sums = torch.stack(
        [
            sum(output.numerator.detach() for output in outputs),
            sum(output.denominator.double() for output in outputs),
            dropped_sequences(outputs),
        ]
    )
    dist.all_reduce(sums, group=context.dp_cp_group)
    numerator, denominator, dropped = sums
    return RankOutcome(
        tp_rank=context.tp_rank,
        cp_rank=context.cp_rank,
        dp_rank=context.dp_rank,
        loss=float(numerator / denominator),
        dropped=float(dropped),
        grad_hidden=[
            (micro_batch.layout, micro_batch.sequences, leaf.grad.squeeze(1) / denominator)
            for micro_batch, leaf in layer.hidden
        ],
        grad_weight=layer.weight.grad / denominator,
    )


def put_together(ranks: list[RankOutcome], sequence_parallel: bool) -> Outcome:
    """The whole outcome from those of all ranks."""
    by_place = {(rank.dp_rank, rank.cp_rank, rank.tp_rank): rank for rank in ranks}
    dp_size, cp_size, tp_size = (1 + max(numbers) for numbers in zip(*by_place, strict=True))
    grad_hidden: dict[int, Tensor] = {}
    for dp_rank in range(dp_size):
        for number, (layout, sequences, _) in enumerate(by_place[dp_rank, 0, 0].grad_hidden):
            shards = []
            for cp_rank in range(cp_size):
                parts = [by_place[dp_rank, cp_rank, tp_rank].grad_hidden[number][2] for tp_rank in range(tp_size)]
                if not sequence_parallel:
                    assert all(torch.equal(part, parts[0]) for part in parts), "tensor-parallel ranks disagree"
                shards.append(torch.cat(parts) if sequence_parallel else parts[0])
            whole = layout.unshard(shards)
            for place, sequence in enumerate(sequences):
                first, length = int(layout.cu_seqlens[place]), int(BATCH.sequence_lengths[sequence])
                grad_hidden[sequence] = whole[first : first + length]
    grad_weight = torch.cat(
        [sum(rank.grad_weight for rank in ranks if rank.tp_rank == tp_rank) for tp_rank in range(tp_size)]
    )
    assert not grad_weight[VOCAB_SIZE:].any(), "padding rows have a gradient"
    assert len({(rank.loss, rank.dropped) for rank in ranks}) == 1
    return Outcome(
        ranks[0].loss,
        [grad_hidden[number] for number in range(BATCH.num_sequences)],
        grad_weight[:VOCAB_SIZE],
        ranks[0].dropped,
    )


def run_grids(grids: dict[str, Grid]) -> dict[str, dict[str, RankOutcome]]:
    # Memory that was never written reads as NaN.
    torch.use_deterministic_algorithms(True)
    return {name: run_grid(grid, ALGORITHMS) for name, grid in grids.items()}


def all_by_log_softmax() -> dict[str, Outcome]:
    return {name: by_log_softmax(algorithm) for name, algorithm in ALGORITHMS.items()}


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Outcome]:
    found: dict[tuple[str, str], Outcome] = {}
    for world_size, grids in GRIDS.items():
        ranks = run_distributed(run_grids, world_size, grids)
        for name, grid in grids.items():
            for algorithm in ALGORITHMS:
                parts = [rank[name][algorithm] for rank in ranks]
                found[name, algorithm] = put_together(parts, bool(grid.sizes.get("sequence_parallel")))
    return found


@pytest.fixture(scope="module")
def exact() -> dict[str, Outcome]:
    return run_distributed(all_by_log_softmax, 1)[0]


def largest_error(mine: Outcome, other: Outcome) -> float:
    pairs = [(mine.grad_weight, other.grad_weight), (torch.cat(mine.grad_hidden), torch.cat(other.grad_hidden))]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return max(*errors, abs(mine.loss - other.loss) / abs(other.loss))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("grid", [name for grids in GRIDS.values() for name in grids])
def test_gradients_of_hidden_states_and_output_matrix(outcomes, exact, grid, algorithm):
    mine = outcomes[grid, algorithm]
    errors = [largest_error(mine, other) for other in (exact[algorithm], outcomes["one rank", algorithm])]
    print(f"{grid}, {algorithm}: {errors[0]:.1e} from log_softmax, {errors[1]:.1e} from one rank")
    assert max(errors) <= TOLERANCE
    assert mine.dropped == exact[algorithm].dropped


def test_the_losses_differ_and_some_sequences_drop(exact):
    assert 0 < exact["FIPO, 7B, with drops"].dropped < BATCH.num_sequences
    norms = {name: float(outcome.grad_weight.norm()) for name, outcome in exact.items()}
    assert len({round(norm, 6) for norm in norms.values()}) == len(ALGORITHMS), norms
