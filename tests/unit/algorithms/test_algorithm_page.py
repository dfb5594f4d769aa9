"""What docs/algorithm.md says in tables and code is what the package does."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from megatron_fipo.algorithms.losses import policy_loss_on_rows
from megatron_fipo.config.algorithm import FIPO_PRESETS, AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import (
    CispoConfig,
    DapoConfig,
    DrGrpoConfig,
    GmpoConfig,
    GrpoConfig,
    GspoConfig,
    SapoConfig,
)

PAGE = (Path(__file__).parents[3] / "docs" / "algorithm.md").read_text(encoding="utf-8")
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "grpo": GrpoConfig(),
    "dapo": DapoConfig(),
    "dr_grpo": DrGrpoConfig(length_divisor=1),
    "fipo": FipoConfig(),
    "gspo": GspoConfig(),
    "cispo": CispoConfig(),
    "sapo": SapoConfig(),
    "gmpo": GmpoConfig(),
}


def table(first_cells: str) -> list[list[str]]:
    """Rows of the table whose heading begins with these cells."""
    _, found, rest = PAGE.partition(f"\n| {first_cells}")
    assert found, first_cells
    lines = (found + rest).strip().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_presets_are_those_of_the_package() -> None:
    heading, *rows = table("| `official-32b`")
    names = [cell.strip("`") for cell in heading[1:-1]]
    assert names == list(FIPO_PRESETS)
    configs = [*(FipoConfig.preset(name) for name in names), FipoConfig()]
    for field, *values in rows:
        assert [yaml.safe_load(value) for value in values] == [getattr(config, field) for config in configs], field
    told = {row[0] for row in rows}
    differing = {
        key for key in FIPO_PRESETS["paper-v2"] if len({setting[key] for setting in FIPO_PRESETS.values()}) > 1
    }
    assert differing <= told


def gradient_factor(config: AlgorithmConfig, ratio: float, advantage: float) -> float:
    """g of −dℓ/d log π_θ = g·A for a response of one token."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    result = policy_loss_on_rows(
        log_probs,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.bool),
        config,
    )
    (gradient,) = torch.autograd.grad(result.loss, [log_probs])
    return -float(gradient) / advantage


def test_gradients_of_one_token_are_those_of_the_package() -> None:
    heading, *rows = table("| r = |")
    ratios = [float(cell) for cell in heading[2:]]
    seen, names = set(), []
    for who, sign, *factors in rows:
        names = re.findall(r"`(\w+)`", who) or names
        for name in names:
            advantage = {"A > 0": 1.0, "A < 0": -1.0}[sign]
            actual = [gradient_factor(ALGORITHMS[name], ratio, advantage) for ratio in ratios]
            assert actual == pytest.approx([float(factor) for factor in factors], rel=5e-4, abs=1e-12), (name, sign)
            seen.add((name, sign))
    assert seen == {(name, sign) for name in ALGORITHMS for sign in ("A > 0", "A < 0")}


def test_every_baseline_averages_as_told() -> None:
    _, *rows = table("`type` |")
    averaging = {row[0].strip("`"): row[-1].strip("`") for row in rows}
    assert averaging == {name: config.aggregation for name, config in ALGORITHMS.items() if name != "fipo"}


def test_equations_are_numbered_in_order() -> None:
    numbers = [int(number) for number in re.findall(r"^    .* \((\d+)\)$", PAGE, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    cited = {int(number) for number in re.findall(r"(?<![\w`])\((\d+)\)", PAGE)}
    assert cited <= set(numbers)


def test_tests_that_the_page_names_exist() -> None:
    root = Path(__file__).parents[3]
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE):
        assert f"def {name}" in (root / path).read_text(encoding="utf-8") if name else (root / path).is_file(), path


def test_the_code_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    rows = {
        "log_probs": torch.full((2, 3), -1.0, requires_grad=True),
        "old_log_probs": torch.full((2, 3), -1.1),
        "advantages": torch.tensor([1.0, -1.0]),
        "response_mask": torch.ones(2, 3, dtype=torch.bool),
    }
    exec(compile(code, "docs/algorithm.md", "exec"), rows)
    assert rows["log_probs"].grad.any()
