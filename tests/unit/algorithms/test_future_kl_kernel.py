"""The Future-KL kernel without a GPU: Triton interprets it, compiles it, and where it is missing torch serves."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_fipo.algorithms.future_kl import kernel

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
POINTERS = {
    "following": "*fp64",
    "bounds": "*i64",
    "tile_segments": "*i32",
    "state": "*i64",
    "counts": "*i64",
    "values": "*fp32",
    "sums": "*fp64",
    "heads": "*fp64",
    "log_ratio": "*fp32",
    "ratio": "*fp32",
    "advantages": "*fp32",
    "future_kl": "*fp32",
    "weights": "*fp32",
}
INTEGERS = ("num_tokens", "num_tiles", "num_segments", "horizon")
SETTINGS = {
    "head_kernel": {"tile_size": kernel.TILE},
    "sum_kernel": {"has_following": False, "tile_size": kernel.TILE},
    "influence_kernel": {
        "participation": "all_tokens",
        "include_current_token": True,
        "reset_risky": False,
        "has_following": True,
        "tile_size": kernel.TILE,
    },
}


@needs_triton
def test_the_interpreted_kernel_agrees_with_the_definition() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    checks = Path(__file__).with_name("interpreted_kernel.py")
    done = subprocess.run(
        [*command, str(checks)], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_kernel_compiles_for_a_gpu_that_is_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_fipo.algorithms.future_kl import kernel_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program, settings = getattr(kernel_programs, name), SETTINGS[name]
    signature, aligned = {}, {}
    for place, argument in enumerate(program.arg_names):
        if argument in settings:
            signature[argument] = "constexpr"
        elif argument in POINTERS:
            signature[argument] = POINTERS[argument]
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32" if argument in INTEGERS else "fp64"
    compiled = triton.compile(
        ASTSource(program, signature, settings, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernel.NUM_WARPS},
    )
    ptx = compiled.asm["ptx"]
    assert ".target sm_90" in ptx and compiled.asm["cubin"]
    # Four tokens a load; a published sum is one word, which one thread reads for all; no spilled registers.
    assert "ld.global.v4.b32" in ptx
    assert "exch.b64" in ptx
    assert re.search(r"or\.b64 (%rd\d+), [^}]*?st\.shared\.b64 \[[^]]*\], \1;", ptx)
    assert ".local" not in ptx


def test_without_triton_the_torch_path_serves() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["numpy"] = None
import torch
from megatron_fipo.algorithms.future_kl import kernel, scan
assert not kernel._has_triton()
print(scan.future_kl(torch.ones(4), float("inf")).tolist())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[4.0, 3.0, 2.0, 1.0]", done.stderr


def test_values_on_the_cpu_are_not_for_the_kernel() -> None:
    assert not kernel.can_run(torch.zeros(4))
