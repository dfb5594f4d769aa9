"""Which logits count as the same."""

import math

import pytest
import torch

from megatron_fipo.conversion.logit_check import compare_logits

LOGITS = [torch.randn(70, 33) * 3, torch.randn(5, 33)]


def test_the_same_logits() -> None:
    found = compare_logits(LOGITS, LOGITS, torch.float32)
    assert found.matches
    assert (found.largest, found.mean_kl, found.top1, found.num_positions) == (0, 0, 1, 75)
    assert found.scale == max(float(each.abs().max()) for each in LOGITS)


def test_one_logit_is_enough() -> None:
    """In float32 a single one counts, in units of the largest."""
    for step, matches in ((0.5e-4, True), (2e-4, False)):
        other = [each.clone() for each in LOGITS]
        scale = max(float(each.abs().max()) for each in LOGITS)
        other[0][69, 3] += step * scale
        found = compare_logits(other, LOGITS, torch.float32)
        assert found.largest == pytest.approx(step * scale, rel=0.02)
        assert found.matches == matches


def test_kl_and_first_tokens() -> None:
    ours, theirs = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(3.0), 0.0]])
    found = compare_logits([ours], [theirs], torch.bfloat16)
    assert found.mean_kl == pytest.approx(0.5 * math.log(3.0))
    assert found.top1 == 0 and not found.matches


def test_what_is_no_number_does_not_match() -> None:
    other = [LOGITS[0].clone(), LOGITS[1]]
    other[0][0, 0] = math.nan
    for ours, theirs in ((other, LOGITS), (LOGITS, other)):
        for dtype in (torch.float32, torch.bfloat16):
            assert not compare_logits(ours, theirs, dtype).matches


def test_logits_that_are_all_0_do_not_match() -> None:
    """They are the same whatever the weights before the output matrix are."""
    for dtype in (torch.float32, torch.bfloat16):
        found = compare_logits([torch.zeros(3, 5)], [torch.zeros(3, 5)], dtype)
        assert found.largest == 0 and not found.is_finite and not found.matches


def test_rounding_that_is_no_number_excuses_nothing() -> None:
    """Logits that are all a little larger have the same probabilities, so that their norm alone is seen."""
    exact = [torch.full_like(each, math.nan) for each in LOGITS]
    found = compare_logits([each + 1 for each in LOGITS], LOGITS, torch.bfloat16, exact)
    assert found.mean_kl < 1e-9 and found.typical > 0.1 and not found.matches


def test_bfloat16_may_differ_by_its_own_rounding() -> None:
    """Noise of 3 % is too much, but not where rounding alone makes 2 %; nor does rounding excuse 30 %."""
    theirs = torch.randn(200, 50)
    near, far = (theirs + torch.randn_like(theirs) * noise for noise in (0.03, 0.3))
    exact = [theirs + torch.randn_like(theirs) * 0.02]
    assert not compare_logits([near], [theirs], torch.bfloat16).matches
    assert compare_logits([near], [theirs], torch.bfloat16, exact).matches
    assert not compare_logits([far], [theirs], torch.bfloat16, exact).matches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_tokens_may_go_to_other_experts(dtype: torch.dtype) -> None:
    theirs = torch.randn(200, 50)
    ours = theirs.clone()
    ours[:10] += torch.randn(10, 50) * 0.2
    assert compare_logits([ours], [theirs], dtype, may_reroute=True).matches
    assert compare_logits([ours], [theirs], dtype).matches == (dtype == torch.bfloat16)
    ours = theirs + torch.randn(200, 50) * 0.2
    assert not compare_logits([ours], [theirs], dtype, may_reroute=True).matches
