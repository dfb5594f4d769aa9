import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.sampler import PromptSampler

requests = st.lists(st.integers(0, 25), max_size=12)


@given(num_prompts=st.integers(1, 20), seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 4))
def test_every_epoch_draws_every_prompt_once(num_prompts, seed, epochs):
    sampler = PromptSampler(num_prompts, seed, shuffle=True)
    for epoch in range(epochs):
        assert sampler.epoch == epoch
        assert sorted(sampler.next_indices(num_prompts)) == list(range(num_prompts))
    assert sampler.epoch == epochs


@given(num_prompts=st.integers(1, 20), seed=st.integers(0, 100), shuffle=st.booleans(), sizes=requests)
def test_the_order_does_not_depend_on_the_requests(num_prompts, seed, shuffle, sizes):
    whole = PromptSampler(num_prompts, seed, shuffle).next_indices(sum(sizes))
    sampler = PromptSampler(num_prompts, seed, shuffle)
    assert [index for size in sizes for index in sampler.next_indices(size)] == whole
    assert sampler.epoch == sum(sizes) // num_prompts


@given(
    num_prompts=st.integers(1, 20),
    seed=st.integers(0, 100),
    shuffle=st.booleans(),
    before=requests,
    elsewhere=st.integers(0, 60),
)
def test_resuming_gives_the_same_order(num_prompts, seed, shuffle, before, elsewhere):
    first = PromptSampler(num_prompts, seed, shuffle)
    for size in before:
        first.next_indices(size)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = PromptSampler(num_prompts, seed, shuffle)
    resumed.next_indices(elsewhere)
    resumed.load_state_dict(state)
    assert resumed.epoch == first.epoch
    assert resumed.next_indices(50) == first.next_indices(50)
    assert resumed.state_dict() == first.state_dict()


def test_orders_differ_by_epoch_and_seed():
    sampler = PromptSampler(1000, 1, shuffle=True)
    first, second = sampler.next_indices(1000), sampler.next_indices(1000)
    assert first != second
    # (1, 1) must not be the order of another pair, such as (2, 0).
    assert PromptSampler(1000, 2, shuffle=True).next_indices(1000) not in (first, second)


def test_without_shuffling_the_sets_order():
    assert PromptSampler(3, 1, shuffle=False).next_indices(7) == [0, 1, 2, 0, 1, 2, 0]


def test_indices_are_plain_integers():
    assert {type(index) for index in PromptSampler(3, 1, shuffle=True).next_indices(7)} == {int}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((11, 1, True), "data.train = 11 prompts: the checkpoint was written with 10"),
        ((10, 2, True), "seed = 2: the checkpoint was written with 1"),
        ((10, 1, False), "data.shuffle = False: the checkpoint was written with True"),
    ],
)
def test_a_state_of_another_order_is_refused(arguments, message):
    state = PromptSampler(10, 1, shuffle=True).state_dict()
    sampler = PromptSampler(*arguments)
    expected = PromptSampler(*arguments).next_indices(10)
    with pytest.raises(ConfigError) as caught:
        sampler.load_state_dict(state)
    assert str(caught.value).startswith(message)
    assert sampler.next_indices(10) == expected


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="num_prompts = 0"):
        PromptSampler(0, 1, shuffle=True)
    with pytest.raises(ConfigError, match="seed = -1: must not be negative"):
        PromptSampler(1, -1, shuffle=True)
