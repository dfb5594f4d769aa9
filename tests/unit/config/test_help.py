from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.base import config_class
from megatron_fipo.config.data import DataConfig, JsonlPrompts
from megatron_fipo.config.help import help_text
from megatron_fipo.config.load import dump_config
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.run import RunConfig


@config_class
class Method:
    """How to train."""

    rate: float = 0.5
    """Learning rate,
    per step."""


@config_class
class Fast(Method):
    """In a hurry."""

    type: Literal["fast"] = "fast"
    """Which variant."""


@config_class
class Slow(Method):
    """With patience."""

    type: Literal["slow"] = "slow"
    """Which variant."""

    rate: float = 0.1
    """A smaller learning rate."""


@config_class
class Data:
    """What to train on."""

    files: tuple[Path, ...] = ()
    """Where the prompts lie."""

    options: dict[str, Any] = field(default_factory=dict)
    """Passed on."""


@config_class
class Root:
    """A small run."""

    steps: int
    """Number of steps."""

    method: Fast | Slow
    """The method."""

    resume: bool = False
    """Go on from the last checkpoint, where there is one and its configuration is the same."""

    data: Data | None = None
    """The prompts; null for none."""

    note: str | None = None
    """Free text."""


EXPECTED = """\
usage: train FILE

A small run.
  --steps INT
      Number of steps. (required)
  --resume true|false
      Go on from the last checkpoint, where there is one and
      its configuration is the same. (default: false)
  --note TEXT|null
      Free text. (default: null)

method (type fast): The method. In a hurry.
  --method.rate FLOAT
      Learning rate, per step. (default: 0.5)
  --method.type fast
      Which variant. (default: fast)

method (type slow): The method. With patience.
  --method.rate FLOAT
      A smaller learning rate. (default: 0.1)
  --method.type slow
      Which variant. (default: slow)

data: The prompts; null for none. What to train on.
  --data.files [PATH, ...]
      Where the prompts lie. (default: [])
  --data.options {KEY: ANY, ...}
      Passed on. (default: {})
"""


def test_help_describes_fields_sections_and_variants() -> None:
    assert help_text(Root, "train FILE", width=60) == EXPECTED


def test_help_has_every_field_of_a_run() -> None:
    """Every field that a dumped configuration spells out, and every one is documented."""
    config = RunConfig(
        output_dir=Path("out"),
        num_steps=1,
        model=ModelConfig(path=Path("model")),
        data=DataConfig(train=JsonlPrompts(path=Path("a")), evaluation=JsonlPrompts(path=Path("b"))),
        algorithm=FipoConfig(),
        parallelism=ParallelismConfig(max_tokens_per_micro_batch=32768),
    )
    text = help_text(RunConfig, "train FILE", width=10_000)
    lines = text.splitlines()
    options = {line.split()[0] for line in lines if line.startswith("  --")}
    keys: list[str] = []
    for line in dump_config(config).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        keys[depth:] = [line.strip().split(":")[0]]
        if not line.endswith(":"):
            # A mapping's own keys are the user's.
            shown = [*keys[:2], "KEY", *keys[3:]] if keys[:2] == ["reward", "terms"] else keys
            assert f"--{'.'.join(shown)}" in options
    for number, line in enumerate(lines):
        if line.startswith("  --"):
            documentation = lines[number + 1].strip()
            assert documentation[0] != "(", f"{line} is not documented"
