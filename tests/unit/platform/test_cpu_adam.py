"""The CPU's Adam against PyTorch's."""

import pytest
import torch

from megatron_fipo.platform.cpu_adam import CpuFusedAdam

SETTINGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5,), (3, 4))]


def take_steps(optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)], ids=["AdamW", "Adam"]
)
def test_steps_equal_those_of_pytorch(decoupled, reference, weight_decay):
    mine, theirs = parameters(), parameters()
    take_steps(CpuFusedAdam(mine, adam_w_mode=decoupled, weight_decay=weight_decay, **SETTINGS), mine, range(4))
    take_steps(reference(theirs, weight_decay=weight_decay, **SETTINGS), theirs, range(4))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


def test_one_step_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    parameter.grad = torch.tensor([-3.0])
    CpuFusedAdam([parameter], lr=0.1, eps=0.0, weight_decay=0.5).step()
    # Decay: 2 · (1 − 0.1 · 0.5) = 1.9; the first corrected step is lr against the gradient's sign.
    assert parameter.item() == pytest.approx(1.9 + 0.1)


def test_leaving_bias_correction_out_is_refused():
    with pytest.raises(ValueError, match="bias_correction = False"):
        CpuFusedAdam(parameters(), bias_correction=False)


def test_the_step_count_belongs_to_the_group():
    trained = parameters()
    optimizer = CpuFusedAdam(trained, **SETTINGS)
    take_steps(optimizer, trained, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3]
    assert set(optimizer.state[trained[0]]) == {"exp_avg", "exp_avg_sq"}


def test_a_parameter_without_gradient_stays():
    trained = parameters()
    before = trained[1].detach().clone()
    optimizer = CpuFusedAdam(trained, weight_decay=0.1, **SETTINGS)
    trained[0].grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(trained[1], before)
    assert trained[1] not in optimizer.state


def test_a_saved_state_goes_on_bit_by_bit():
    whole, halved = parameters(), parameters()
    take_steps(CpuFusedAdam(whole, **SETTINGS), whole, range(4))
    first, second = (CpuFusedAdam(halved, **SETTINGS) for _ in range(2))
    take_steps(first, halved, range(2))
    second.load_state_dict(first.state_dict())
    take_steps(second, halved, range(2, 4))
    for one, other in zip(halved, whole, strict=True):
        assert torch.equal(one, other)
