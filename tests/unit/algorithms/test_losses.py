"""The losses on plain rows: what they refuse, and what they leave out."""

import pytest
import torch

from megatron_fipo.algorithms.losses import fipo_loss
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.baselines import DapoConfig

CONFIG = FipoConfig.preset("official-32b")


def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(3, 2, 5, generator=generator)
    return {
        "log_probs": draw[0] * 0.1 - 1,
        "old_log_probs": draw[1] * 0.1 - 1,
        "advantages": draw[2],
        "response_mask": torch.ones(2, 5, dtype=torch.bool),
    }


@pytest.mark.parametrize("name", ["old_log_probs", "advantages", "response_mask"])
@pytest.mark.parametrize("change", [torch.Tensor.t, torch.Tensor.flatten], ids=["transposed", "flat"])
def test_a_tensor_of_another_shape_is_refused_by_name(name: str, change: object) -> None:
    given = rows()
    given[name] = change(given[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"{name}\.shape = .*must be \(2, 5\)"):
        fipo_loss(**given, config=CONFIG)


def test_another_algorithms_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="config is a DapoConfig: must be a FipoConfig; use policy_loss_on_rows"):
        fipo_loss(**rows(), config=DapoConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_one_advantage_a_sequence_serves_all_its_tokens(shape: tuple[int, ...]) -> None:
    given = rows()
    per_sequence = given["advantages"][:, 0].clone()
    spread = fipo_loss(**{**given, "advantages": per_sequence[:, None].expand(2, 5)}, config=CONFIG)
    short = fipo_loss(**{**given, "advantages": per_sequence.view(shape)}, config=CONFIG)
    assert torch.equal(short.loss, spread.loss)


def test_an_extreme_of_no_token_is_left_out() -> None:
    given = rows()
    given["response_mask"] = torch.zeros(2, 5, dtype=torch.bool)
    result = fipo_loss(**given, config=CONFIG)
    assert result.loss == 0.0
    assert not [key for key in result.metrics if key.endswith(("_max", "_min"))]
