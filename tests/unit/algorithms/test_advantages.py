import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithms.advantages import group_relative_advantages
from megatron_fipo.algorithms.filters import samples_with_signal


def test_hand_computed_groups_in_any_order():
    rewards = torch.tensor([1.0, 5.0, 0.0, 1.0, 3.0])
    group_ids = torch.tensor([7, 2, 7, 7, 2])
    # Group 7: rewards 1, 0, 1, mean 2/3, unbiased variance 1/3. Group 2: rewards 5, 3, mean 4, variance 2.
    expected = torch.tensor([(1 / 3) * 3**0.5, 2**-0.5, (-2 / 3) * 3**0.5, (1 / 3) * 3**0.5, -(2**-0.5)])
    advantages = group_relative_advantages(rewards, group_ids, epsilon=0.0)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, expected)


def test_epsilon_is_added_to_the_standard_deviation():
    rewards = torch.tensor([1.0, -1.0])
    advantages = group_relative_advantages(rewards, torch.zeros(2, dtype=torch.int64), epsilon=0.5)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0]) / (2**0.5 + 0.5))


def test_without_normalisation_only_the_mean_is_taken_off():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    advantages = group_relative_advantages(rewards, torch.zeros(4, dtype=torch.int64), normalize_by_std=False)
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("normalize_by_std", [True, False])
def test_a_group_without_variance_gets_exactly_zero(normalize_by_std):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.3, 1.0, -1.0])
    group_ids = torch.tensor([0, 0, 0, 1, 2, 2])
    advantages = group_relative_advantages(rewards, group_ids, normalize_by_std=normalize_by_std, epsilon=0.0)
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[4] > 0 > advantages[5]
    assert samples_with_signal(rewards, group_ids).tolist() == [False] * 4 + [True] * 2


@given(
    groups=st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=6), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_equals_torch_std_group_by_group_in_any_order(groups, seed):
    rewards = torch.tensor([float(reward) for group in groups for reward in group])
    group_ids = torch.tensor([10 * index for index, group in enumerate(groups) for _ in group])
    expected = []
    for group in groups:
        values = torch.tensor(group, dtype=torch.float64)
        varies = len(set(group)) > 1
        expected.append((values - values.mean()) / (values.std() + 1e-6) if varies else values * 0)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    advantages = group_relative_advantages(rewards[order], group_ids[order])
    torch.testing.assert_close(advantages, torch.cat(expected).float()[order])
    nonzero = torch.cat(expected)[order] != 0
    assert samples_with_signal(rewards[order], group_ids[order])[nonzero].all()


def test_an_unscored_sample_is_refused():
    with pytest.raises(ValueError, match=r"rewards\[1\] = nan: must be finite"):
        group_relative_advantages(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]))


def test_no_samples():
    assert group_relative_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
