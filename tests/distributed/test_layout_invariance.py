"""Three updates of a fixed ragged batch, however model, batch and packs are cut: the same numbers as in one process.

The norms are those of docs/architecture.md, contract 1, in float32: losses, gradient norms, the gradient of every
parameter and the weights after three steps. Every pair of ways to cut is tested on every change, all of them with the
marker `exhaustive`; `tests.invariance` holds the parts.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields

import pytest

from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.parallel.packing import plan_packs
from tests.distributed.conftest import References
from tests.distributed_helpers import run_distributed
from tests.invariance.compare import Deviation, deviation
from tests.invariance.grid import (
    ALL_LEVELS,
    QUICK_LEVELS,
    Combination,
    Levels,
    every_combination,
    exhaustive,
    pairwise,
)
from tests.invariance.ledger import Ledger, write_report
from tests.invariance.updates import BUDGETS, SEEDS, ragged_batch, run_combinations

PAIRWISE = pairwise(QUICK_LEVELS)
EXHAUSTIVE = exhaustive()
# Combinations that share one start of the ranks.
LAUNCH = 8


def deviations(references: References, combinations: Sequence[Combination]) -> Iterator[tuple[Combination, Deviation]]:
    """Run combinations, those of one world size together."""
    for world_size, group in itertools.groupby(combinations, lambda each: each.world_size):
        for launch in itertools.batched(group, LAUNCH):
            ranks = run_distributed(run_combinations, world_size, references.root, launch, timeout_s=500.0)
            for combination, outcomes in zip(launch, zip(*ranks, strict=True), strict=True):
                yield combination, deviation(outcomes, references.outcomes[combination.reference])


@pytest.fixture(scope="module")
def pairwise_deviations(references: References) -> dict[Combination, Deviation]:
    found = dict(deviations(references, PAIRWISE))
    write_report(found)
    return found


@pytest.mark.distributed
def test_no_rounding_can_flip_a_decision_and_every_rule_is_exercised(references: References) -> None:
    """A failure here asks for other seeds: see `tests.invariance.choose_seeds`."""
    assert {str(combination): faults for combination, faults in references.faults.items() if faults} == {}


@pytest.mark.parametrize("model", SEEDS)
@pytest.mark.parametrize(("context", "data"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_some_rank_holds_no_response_token(model: str, context: int, data: int) -> None:
    batch = ragged_batch(SEEDS[model])
    rules = packing_rules(ParallelismConfig(context_parallel_size=context, max_tokens_per_micro_batch=BUDGETS["small"]))
    plan = plan_packs(batch.sequence_lengths.tolist(), batch.mini_batch_ids.tolist(), data, rules)
    mask, starts = batch.response_mask, batch.sequence_starts
    counts = []
    for packs, cp_rank in itertools.product(plan[0], range(context)):
        counts.append(0)
        for pack in packs:
            layout = pack.layout(context, cp_rank)
            for sequence, position in zip(layout.local_sequence_ids, layout.local_positions + 1, strict=True):
                if sequence < len(pack.sequences):
                    index = pack.sequences[sequence]
                    place = int(starts[index] + position)
                    counts[-1] += bool(place < starts[index + 1] and mask[place])
    assert sum(counts) == mask[: starts[1]].sum() > 0
    assert 0 in counts


def pairs(combinations: Iterator[Combination] | Sequence[Combination]) -> set[tuple[object, ...]]:
    names = [field.name for field in fields(Combination)]
    found: set[tuple[object, ...]] = set()
    for each in combinations:
        found.update(itertools.combinations([(name, getattr(each, name)) for name in names], 2))
    return found


@pytest.mark.parametrize("levels", [QUICK_LEVELS, ALL_LEVELS], ids=["quick", "all"])
def test_the_cover_has_every_pair_that_a_legal_combination_has(levels: Levels) -> None:
    chosen = pairwise(levels)
    assert pairs(chosen) == pairs(every_combination(levels))
    assert len(chosen) < 60


def test_the_quick_levels_leave_out_sizes_alone() -> None:
    for name, values in QUICK_LEVELS.items():
        assert values == ALL_LEVELS[name][: len(values)]
        assert len(values) >= 2


@pytest.mark.distributed
@pytest.mark.parametrize("combination", PAIRWISE, ids=str)
def test_every_pair_of_cuts_gives_the_same_updates(
    pairwise_deviations: dict[Combination, Deviation], combination: Combination
) -> None:
    found = pairwise_deviations[combination]
    print(f"{combination}: {found}")
    assert found.violations == [], found


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    ledger = Ledger.from_environment()
    yield ledger
    known = [combination for combination in EXHAUSTIVE if str(combination) in ledger.results]
    write_report({combination: ledger.results[str(combination)] for combination in known})


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("part", itertools.batched(EXHAUSTIVE, LAUNCH), ids=lambda part: str(part[0]))
def test_every_cut_gives_the_same_updates(
    references: References, ledger: Ledger, part: tuple[Combination, ...]
) -> None:
    """Goes on from the file that `MEGATRON_FIPO_LAYOUT_CACHE` names."""
    missing = [combination for combination in part if str(combination) not in ledger.results]
    for combination, found in deviations(references, missing):
        ledger.add(combination, found)
    wrong = {str(each): ledger.results[str(each)].violations for each in part if ledger.results[str(each)].violations}
    assert wrong == {}
