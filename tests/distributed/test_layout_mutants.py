"""Known ways to get a layout wrong, put back one at a time: the suite's comparison must fail on each.

Every mutant patches one named function in the ranks of a small run, and is compared with one process exactly as
`test_layout_invariance.py` compares. The same runs without a mutant must agree.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_fipo.actor import forward, local_layers, shard, train_step
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.algorithms import influence, policy_loss
from megatron_fipo.algorithms.future_kl import context_parallel
from megatron_fipo.algorithms.policy_loss import LossOutput
from megatron_fipo.parallel.layout import PackLayout
from tests import tiny_actors
from tests.distributed.conftest import References
from tests.distributed_helpers import run_distributed
from tests.invariance.compare import deviation
from tests.invariance.grid import Combination
from tests.invariance.updates import Outcome, run_combinations

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Mutant:
    """A wrong way, and where it must be seen.

    Attributes:
        apply: Puts it in place.
        combination: A layout that shows it.
    """

    apply: Callable[[pytest.MonkeyPatch], None]
    combination: Combination


def with_output(patch: pytest.MonkeyPatch, change: Callable[[LossOutput], LossOutput]) -> None:
    """Let every micro-batch's loss pass through `change`."""
    right = policy_loss.policy_loss
    patch.setattr(train_step, "policy_loss", lambda *args, **kwargs: change(right(*args, **kwargs)))


def mean_of_micro_batch_means(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch divides by its own count, and the results are averaged (verl#5863)."""
    with_output(
        patch,
        lambda output: replace(
            output,
            numerator=output.numerator / output.denominator.clamp(min=1),
            denominator=torch.ones_like(output.denominator),
        ),
    )


def count_without_context_parallel_ranks(patch: pytest.MonkeyPatch) -> None:
    """D is summed over the data-parallel group, numerators over data and context (verl#5983).

    A rank without response tokens would divide by zero, so that every rank counts at least one.
    """
    right = TrainStep._sum_denominators

    def over_data_parallel_ranks(self: TrainStep) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "context", replace(self.context, dp_cp_group=self.context.dp_group))
            return right(self).clamp(min=1)

    patch.setattr(TrainStep, "_sum_denominators", over_data_parallel_ranks)


def context_parallelism_turns_per_token_loss_off(patch: pytest.MonkeyPatch) -> None:
    """CP > 1 silently means "average over micro-batches and ranks" to megatron-core (verl#6836)."""
    right = tiny_actors.build_provider

    def flipped(*args: Any) -> Any:
        provider = right(*args)
        provider.calculate_per_token_loss = provider.context_parallel_size == 1
        return provider

    patch.setattr(tiny_actors, "build_provider", flipped)


def hidden_gradient_is_one_ranks_part(patch: pytest.MonkeyPatch) -> None:
    """The head's gradient is not summed over tensor-parallel ranks (ms-swift#9947)."""
    patch.setattr(forward, "copy_to_tensor_model_parallel_region", lambda hidden, group: hidden)


def hidden_gradient_is_one_ranks_part_under_sequence_parallelism(patch: pytest.MonkeyPatch) -> None:
    """The same where hidden states are gathered: the backward pass cuts instead of summing (ms-swift#9947)."""
    patch.setattr(forward, "gather_from_sequence_parallel_region", _gather_whose_gradient_is_cut)


def _gather_whose_gradient_is_cut(values: torch.Tensor, *, group: Any, **_: Any) -> torch.Tensor:
    return gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=group)


def sum_is_scaled_by_the_ranks(patch: pytest.MonkeyPatch) -> None:
    """The sum is multiplied by the data- and context-parallel ranks, as if they were averaged over (slime#990)."""
    with_output(patch, lambda output: replace(output, numerator=output.numerator * dist.get_world_size()))


def sum_is_divided_by_the_micro_batches(patch: pytest.MonkeyPatch) -> None:
    """The gradient is divided by the number of micro-batches on top of D (slime#990)."""
    right = TrainStep._sum_denominators
    patch.setattr(TrainStep, "_sum_denominators", lambda self: right(self) * len(self._denominators))


def count_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """D is added up in the compute dtype, which has no odd numbers above 256."""
    right = TrainStep._sum_denominators
    patch.setattr(TrainStep, "_sum_denominators", lambda self: right(self).bfloat16().double())


def count_of_a_micro_batch_is_at_least_one(patch: pytest.MonkeyPatch) -> None:
    """A micro-batch without response tokens adds one to D, as megatron-core's own clamp would have it."""
    with_output(patch, lambda output: replace(output, denominator=output.denominator.clamp(min=1)))


def drops_are_decided_by_every_rank_alone(patch: pytest.MonkeyPatch) -> None:
    """A context-parallel rank counts the dual-clipped tokens that it holds itself."""
    right = influence.context_parallel_future_kl

    def counting_alone(
        log_ratio: Any, half_life: Any, layout: PackLayout, group: Any, clipped: Any, **rest: Any
    ) -> Any:
        sums, counts = right(log_ratio, half_life, layout, group, clipped, **rest)
        return sums, torch.zeros_like(counts).index_add(0, layout.local_sequence_ids, clipped.long())

    patch.setattr(influence, "context_parallel_future_kl", counting_alone)


def future_kl_ends_with_the_chunk(patch: pytest.MonkeyPatch) -> None:
    """Nothing is carried over from later chunks."""
    right = context_parallel.fold
    patch.setattr(context_parallel, "fold", lambda chunks, layout: torch.zeros_like(right(chunks, layout)))


def labels_are_shifted_after_the_cut(patch: pytest.MonkeyPatch) -> None:
    """The label of a chunk's last token is the first token of this rank's next chunk."""
    right = shard.build_micro_batch

    def shifting_late(*args: Any, **kwargs: Any) -> MicroBatch:
        micro_batch = right(*args, **kwargs)
        following = micro_batch.token_ids[0].roll(-1)
        return replace(micro_batch, response_targets=following[micro_batch.response_positions])

    patch.setattr(shard, "build_micro_batch", shifting_late)


def response_ratio_of_one_ranks_tokens(patch: pytest.MonkeyPatch) -> None:
    """GSPO's mean over a response leaves the other context-parallel ranks' tokens out."""
    right = policy_loss.sequence_means

    def of_this_ranks_tokens(values: Any, mask: Any, sequences: Any, layout: PackLayout, _: Any) -> torch.Tensor:
        alone = PackLayout(tuple(layout.local_chunk_lengths))
        return right(values, mask, sequences, alone, None)

    patch.setattr(policy_loss, "sequence_means", of_this_ranks_tokens)


def sequences_are_counted_by_every_rank(patch: pytest.MonkeyPatch) -> None:
    """Every context-parallel rank counts a sequence whose tokens it shares."""
    right = policy_loss._sequence_counts
    patch.setattr(policy_loss, "_sequence_counts", lambda inputs: replace(right(inputs), counted_here=True))


def norm_gradients_stay_with_their_tokens(patch: pytest.MonkeyPatch) -> None:
    """Gradients of norm weights are not summed over sequence-parallel ranks."""
    right = local_layers.SequenceParallelRMSNorm.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    patch.setattr(local_layers.SequenceParallelRMSNorm, "__init__", unmarked)


def tied_embedding_gradients_stay_with_their_stage(patch: pytest.MonkeyPatch) -> None:
    """The first and last stage do not add up their gradients of a tied embedding."""
    module = importlib.import_module(finalize_model_grads.__module__)
    patch.setattr(module, "_allreduce_word_embedding_grads", lambda *args, **kwargs: None)


def key_gradients_stay_with_their_queries(patch: pytest.MonkeyPatch) -> None:
    """Gradients of keys and values are not summed over the context-parallel ranks whose queries saw them."""
    patch.setattr(
        local_layers,
        "gather_from_sequence_parallel_region",
        lambda values, **kwargs: _gather_whose_gradient_is_cut(values, group=kwargs["group"]),
    )


ONE, DATA, CONTEXT = Combination(budget="small"), Combination(data=2), Combination(context=2)
SMALL_CONTEXT = Combination(context=2, budget="small")
GSPO = Combination(algorithm="gspo", context=2)
TENSOR, SEQUENCE = Combination(tensor=(2, False)), Combination(model="moe", tensor=(2, True))

MUTANTS = [
    Mutant(mean_of_micro_batch_means, ONE),
    Mutant(count_without_context_parallel_ranks, CONTEXT),
    Mutant(context_parallelism_turns_per_token_loss_off, SMALL_CONTEXT),
    Mutant(hidden_gradient_is_one_ranks_part, TENSOR),
    Mutant(hidden_gradient_is_one_ranks_part_under_sequence_parallelism, SEQUENCE),
    Mutant(sum_is_scaled_by_the_ranks, DATA),
    Mutant(sum_is_divided_by_the_micro_batches, ONE),
    Mutant(count_in_bfloat16, Combination(algorithm="dapo", budget="small")),
    Mutant(count_of_a_micro_batch_is_at_least_one, DATA),
    Mutant(drops_are_decided_by_every_rank_alone, CONTEXT),
    Mutant(future_kl_ends_with_the_chunk, CONTEXT),
    Mutant(labels_are_shifted_after_the_cut, CONTEXT),
    Mutant(response_ratio_of_one_ranks_tokens, GSPO),
    Mutant(sequences_are_counted_by_every_rank, GSPO),
    Mutant(norm_gradients_stay_with_their_tokens, SEQUENCE),
    Mutant(tied_embedding_gradients_stay_with_their_stage, Combination(pipeline=(2, 1))),
    Mutant(key_gradients_stay_with_their_queries, CONTEXT),
]
UNMUTATED = list(dict.fromkeys(mutant.combination for mutant in MUTANTS))


def run_mutants(root: Path, mutants: Sequence[Mutant]) -> list[Outcome]:
    outcomes = []
    for mutant in mutants:
        with pytest.MonkeyPatch.context() as patch:
            mutant.apply(patch)
            outcomes += run_combinations(root, [mutant.combination])
    return outcomes


def nothing(patch: pytest.MonkeyPatch) -> None:
    """Leave everything as it is."""


@pytest.fixture(scope="module")
def violations(references: References) -> dict[tuple[str, Combination], list[str]]:
    """What the comparison finds wrong, by mutant and combination."""
    found = {}
    runs = [*MUTANTS, *(Mutant(nothing, combination) for combination in UNMUTATED)]
    for world_size in (1, 2):
        group = [run for run in runs if run.combination.world_size == world_size]
        ranks = run_distributed(run_mutants, world_size, references.root, group, timeout_s=500.0)
        for run, outcomes in zip(group, zip(*ranks, strict=True), strict=True):
            reference = references.outcomes[run.combination.reference]
            found[run.apply.__name__, run.combination] = deviation(outcomes, reference).violations
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.apply.__name__)
def test_the_comparison_sees_every_mutant(violations, mutant):
    seen = violations[mutant.apply.__name__, mutant.combination]
    print(f"{mutant.combination}: {'; '.join(seen)}")
    assert seen


@pytest.mark.parametrize("combination", UNMUTATED, ids=str)
def test_the_same_runs_agree_without_a_mutant(violations, combination):
    assert violations["nothing", combination] == []
