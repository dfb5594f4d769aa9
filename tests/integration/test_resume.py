"""Runs that go on after an end: the same steps as without one, in the same files."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.runtime.logging import quiet_upstream
from tests.distributed_helpers import run_distributed
from tests.integration.small_runs import (
    Ended,
    prompts,
    read_lines,
    run_to_its_end,
    small_run,
    without_times,
    write_inputs,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("resume"))


def config(root: Path, name: str, num_steps: int, **changes: Any) -> Any:
    values = {
        "rollout": {"over_sampling": 1.5, "carry_over_max_lag": 1, "max_response_tokens": 6},
        "checkpoint": {"every_steps": 2, "export_dtype": "float32", "verify_export": False},
        "evaluation": {"num_prompts": 4, "every_steps": 1},
        "data": prompts(root, held_out="held_out"),
    }
    return small_run(root, name, num_steps=num_steps, **(values | changes))


def run_in_parts(root: Path, name: str, parts: list[int], **changes: Any) -> list[Ended]:
    quiet_upstream()
    return [run_to_its_end(config(root, name, num_steps, **changes)) for num_steps in parts]


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    return without_times(read_lines(root / name / "metrics.jsonl"))


def export_digest(root: Path, name: str) -> str:
    return hashlib.sha256((root / name / "export" / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_that_goes_on_repeats_the_uninterrupted_one_bit_by_bit(root: Path) -> None:
    for name, parts in (("whole", [STEPS]), ("parts", [1, 3, STEPS])):
        for ended in run_distributed(run_in_parts, 2, root, name, parts):
            assert [each.error for each in ended] == [()] * len(parts)
    whole, parts_lines = lines(root, "whole"), lines(root, "parts")
    assert [line["step"] for line in parts_lines] == list(range(STEPS + 1))
    assert parts_lines == whole
    assert export_digest(root, "parts") == export_digest(root, "whole")
    assert read_lines(root / "parts" / "samples.jsonl") == read_lines(root / "whole" / "samples.jsonl")
