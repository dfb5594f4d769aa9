"""docs/configuration.md is what its tool writes, and the tool finds what classes say and check."""

from pathlib import Path
from types import ModuleType

import pytest

from tests.tool_modules import load_tool

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("generate_configuration_docs")


def test_the_page_is_fresh(tool: ModuleType) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == tool.page(), "run `make docs`"


def section(page: str, title: str) -> dict[str, str]:
    """Rows of a section's table, by field."""
    body = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return {row.split("`")[1]: row for row in body.splitlines() if row.startswith("| `")}


def test_rows_hold_type_default_meaning_and_rules(tool: ModuleType) -> None:
    page = tool.page()
    run = section(page, "The run")
    about = "Run directory; a new or empty one, or that of a run to go on with."
    assert run["output_dir"] == f"| `output_dir` | `PATH` | required | {about} |"
    assert run["num_steps"].endswith(" optimizer steps. *Must be at least 1.* |")
    # A rule in a loop over names.
    assert "*Must be at least 1.*" in section(page, "`parallelism`")["context_parallel_size"]
    # A rule of a section above, with values in it.
    assert (
        "*Must be a multiple of algorithm.updates_per_rollout = ….*"
        in (section(page, "`rollout`")["num_prompts_per_step"])
    )
    # A rule that sections share.
    assert "*Must lie in [1e-9, 1e9]" in section(page, "`data.train`, type jsonl")["weight"]


def test_a_variant_has_its_own_defaults_and_rules(tool: ModuleType) -> None:
    page = tool.page()
    fipo, grpo = (section(page, f"`algorithm`, type {kind}")["updates_per_rollout"] for kind in ("fipo", "grpo"))
    assert "FIPO needs at least 2" in fipo
    assert "needs at least 2" not in grpo
    high = [section(page, f"`algorithm`, type {kind}")["clip_high"] for kind in ("fipo", "grpo")]
    assert ["`0.28`" in high[0], "`0.2`" in high[1]] == [True, True]


def test_every_section_of_the_command_line_is_there(tool: ModuleType) -> None:
    from megatron_fipo.config.description import describe
    from megatron_fipo.config.evaluate import EvaluateConfig
    from megatron_fipo.config.run import RunConfig

    page = tool.page()
    for root in (RunConfig, EvaluateConfig):
        for each in describe(root):
            assert each.path == "" or f"\n## `{each.path}`" in page
