"""The canary's tokens."""

import pytest

from megatron_fipo.weight_sync.canary import canary_token_ids


def test_tokens_are_ordinary_and_always_the_same():
    token_ids = canary_token_ids(300, {256, 0}, longest=4096)
    assert token_ids == canary_token_ids(300, {256, 0}, longest=4096)
    assert len(token_ids) == 64 and len(set(token_ids)) > 32
    assert set(token_ids) <= set(range(299)) - {256, 0}


@pytest.mark.parametrize(("longest", "length"), [(40, 40), (64, 64), (1, 4)])
def test_it_is_no_longer_than_what_fits(longest, length):
    assert len(canary_token_ids(300, (), longest)) == length


def test_special_tokens_are_used_where_there_are_no_others():
    assert set(canary_token_ids(3, {0, 1, 2}, longest=32)) == {0, 1}
