"""Legal packs for every mini-batch and rank, nothing lost, and little wasted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.parallel.layout import sequence_multiple
from megatron_fipo.parallel.packing import Pack, PackingRules, PackPlan, plan_packs


def rules(max_tokens: int = 100, cp_size: int = 1, pack_multiple: int = 1, micro_batch_multiple: int = 1):
    return PackingRules(
        max_tokens=max_tokens,
        cp_size=cp_size,
        pack_multiple=pack_multiple,
        micro_batch_multiple=micro_batch_multiple,
    )


def loads(mini_batch: tuple[tuple[Pack, ...], ...]) -> list[int]:
    """Tokens of every data-parallel rank, padding included."""
    return [sum(sum(pack.padded_lengths) for pack in share) for share in mini_batch]


def test_packs_by_hand():
    plan = plan_packs([60, 10, 50, 40, 30], [0] * 5, dp_size=1, rules=rules())
    assert plan == (((Pack((0, 1, 4), (60, 10, 30)), Pack((2, 3), (50, 40))),),)


def test_packs_are_dealt_so_that_ranks_carry_the_same():
    plan = plan_packs([90, 80, 70, 60], [0] * 4, dp_size=2, rules=rules())
    assert plan == (
        ((Pack((0,), (90,)), Pack((3,), (60,))), (Pack((1,), (80,)), Pack((2,), (70,)))),
    )  # 150 tokens each


def test_ranks_get_as_many_packs_even_when_one_pack_weighs_as_much_as_three():
    plan = plan_packs([100, 40, 40, 40], [0] * 4, dp_size=2, rules=rules())
    assert plan == (((Pack((0,), (100,)), Pack((3,), (40,))), (Pack((1,), (40,)), Pack((2,), (40,)))),)


def test_mini_batches_are_planned_apart():
    plan = plan_packs([10, 20, 30], [1, 0, 1], dp_size=1, rules=rules())
    assert plan == (((Pack((1,), (20,)),),), ((Pack((0, 2), (10, 30)),),))


def test_sequences_and_packs_are_padded_to_their_multiples():
    # Context size 2 pads sequences to multiples of 4; tensor 4 × context 2 pads the pack to a multiple of 8.
    (((pack,),),) = plan_packs([5, 3], [0, 0], dp_size=1, rules=rules(cp_size=2, pack_multiple=8))
    assert pack == Pack((0, 1), (8, 4, 4))
    assert pack.layout(cp_size=2, cp_rank=1).num_local_tokens == 8


def test_ranks_without_a_sequence_get_null_micro_batches():
    (mini_batch,) = plan_packs([7], [0], dp_size=3, rules=rules(cp_size=2, pack_multiple=8))
    null = Pack((), (8,))
    assert mini_batch == ((Pack((0,), (8,)),), (null,), (null,))


def test_interleaved_pipelines_get_a_multiple_of_micro_batches():
    (mini_batch,) = plan_packs([90, 80, 70], [0] * 3, dp_size=1, rules=rules(micro_batch_multiple=2))
    assert [pack.sequences for pack in mini_batch[0]] == [(0,), (1,), (2,), ()]


def test_a_mini_batch_without_sequences_is_a_null_micro_batch():
    plan = plan_packs([7], [1], dp_size=2, rules=rules())
    assert plan[0] == ((Pack((), (1,)),), (Pack((), (1,)),))


def test_no_sequences_no_mini_batches():
    assert plan_packs([], [], dp_size=2, rules=rules()) == ()


def test_the_longest_sequence_may_fill_the_budget():
    (((pack,),),) = plan_packs([96], [0], dp_size=1, rules=rules(max_tokens=100, cp_size=2, pack_multiple=8))
    assert pack.padded_lengths == (96,)


@pytest.mark.parametrize(
    ("length", "options", "padded", "at_least"),
    [(101, {}, 101, 101), (94, {"max_tokens": 95, "cp_size": 2, "pack_multiple": 16}, 96, 96)],
)
def test_a_sequence_beyond_the_budget_is_refused_with_a_way_out(length, options, padded, at_least):
    with pytest.raises(ConfigError) as caught:
        plan_packs([3, length], [0, 0], dp_size=1, rules=rules(**options))
    assert str(caught.value) == (
        f"parallelism.max_tokens_per_micro_batch = {options.get('max_tokens', 100)}: must hold the longest sequence, "
        f"{padded} tokens after padding; raise it to at least {at_least} or shorten rollout.max_response_tokens"
    )


@st.composite
def rollouts(draw):
    tp, cp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    parallelism = ParallelismConfig(tensor_model_parallel_size=tp, context_parallel_size=cp)
    packing = rules(
        max_tokens=draw(st.integers(48, 120)),
        cp_size=cp,
        pack_multiple=parallelism.pack_multiple,
        micro_batch_multiple=draw(st.sampled_from([1, 2, 3])),
    )
    num_mini_batches = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 24), max_size=40))
    mini_batches = [draw(st.integers(0, num_mini_batches - 1)) for _ in lengths]
    return lengths, mini_batches, draw(st.integers(1, 5)), packing


@given(rollouts())
def test_every_plan_is_legal(rollout):
    lengths, mini_batch_ids, dp_size, packing = rollout
    plan = plan_packs(lengths, mini_batch_ids, dp_size, packing)
    assert len(plan) == max(mini_batch_ids, default=-1) + 1
    for number, mini_batch in enumerate(plan):
        assert len(mini_batch) == dp_size
        (count,) = {len(share) for share in mini_batch}
        assert count >= 1
        assert count % packing.micro_batch_multiple == 0
        packs = [pack for share in mini_batch for pack in share]
        placed = sorted(index for pack in packs for index in pack.sequences)
        assert placed == [index for index, mini_batch_id in enumerate(mini_batch_ids) if mini_batch_id == number]
        for pack in packs:
            assert_legal(pack, lengths, packing)


def assert_legal(pack: Pack, lengths: list[int], packing: PackingRules) -> None:
    total, multiple = sum(pack.padded_lengths), sequence_multiple(packing.cp_size)
    assert 0 < total <= packing.max_tokens
    assert total % packing.pack_multiple == 0
    assert 0 <= len(pack.padded_lengths) - len(pack.sequences) <= 1
    for index, padded in zip(pack.sequences, pack.padded_lengths, strict=False):
        assert lengths[index] <= padded < lengths[index] + multiple
    assert list(pack.sequences) == sorted(pack.sequences)
    assert pack.layout(packing.cp_size, 0).num_tokens == total


@given(rollouts())
def test_plans_repeat(rollout):
    assert plan_packs(*rollout) == plan_packs(*rollout)


def ragged_lengths(num_sequences: int, seed: int) -> list[int]:
    """Lengths as long-reasoning rollouts have them: lognormal around 3,000 tokens, some at the limit of 20,480."""
    drawn = np.random.default_rng(seed).lognormal(np.log(3000), 1.0, num_sequences)
    return np.clip(drawn, 200, 20480).astype(int).tolist()


MIXES = {
    "DP 4": (4, rules(max_tokens=32768)),
    "DP 4, TP 8": (4, rules(max_tokens=32768, pack_multiple=8)),
    "DP 4, TP 4 × CP 4": (4, rules(max_tokens=32768, cp_size=4, pack_multiple=16)),
    "DP 4, interleaved PP 4": (4, rules(max_tokens=32768, micro_batch_multiple=4)),
    "DP 8": (8, rules(max_tokens=32768)),
}


def measure(plan: PackPlan, lengths: list[int]) -> tuple[float, float]:
    """Real tokens per computed token, and the heaviest rank's load over the mean, less 1, in the worst mini-batch."""
    computed = sum(sum(loads(mini_batch)) for mini_batch in plan)
    imbalance = max(max(loads(mini_batch)) / np.mean(loads(mini_batch)) - 1 for mini_batch in plan)
    return sum(lengths) / computed, imbalance


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_little_is_wasted_on_a_long_tailed_rollout(mix, seed):
    dp_size, packing = MIXES[mix]
    lengths = ragged_lengths(512 * 16, seed)
    plan = plan_packs(lengths, [index // 1024 for index in range(len(lengths))], dp_size, packing)
    real, imbalance = measure(plan, lengths)
    print(f"{mix}, seed {seed}: {real:.2%} real tokens, imbalance {imbalance:.2%}")
    assert real >= 0.97
    assert imbalance <= 0.03


def test_even_small_mini_batches_are_balanced():
    lengths = ragged_lengths(8 * 64, seed=0)
    plan = plan_packs(lengths, [index // 64 for index in range(len(lengths))], 4, rules(max_tokens=32768))
    real, imbalance = measure(plan, lengths)
    assert real >= 0.97
    assert imbalance <= 0.03


def test_a_pack_that_attention_cannot_work_on_is_refused():
    assert Pack((0, 1), (8, 4)).layout(cp_size=2, cp_rank=1).num_local_tokens == 6
    with pytest.raises(ValueError, match=r"padded_lengths\[1\] = 6: must be a positive multiple of 4"):
        Pack((0, 1), (8, 6)).layout(cp_size=2, cp_rank=0)
