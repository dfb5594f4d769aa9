"""What servers need on a machine without CUDA: that it does no harm, and that SGLang still needs it."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo import platform
from tests.sglang_servers import needs_sglang

SHIM = Path(platform.__file__).parent / "sglang_cpu_shim"


def run_python(program: str, *folders: Path) -> str:
    paths = os.pathsep.join(map(str, (SHIM, *folders)))
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_modules_of_no_use_to_a_server_seem_not_installed() -> None:
    program = "import importlib.util as u; print([u.find_spec(name) for name in ('scipy', 'megatron')])"
    assert run_python(program) == "[None, None]\n"
    program = "import sgl_kernel\ntry: sgl_kernel.any_kernel()\nexcept NotImplementedError as error: print(error)"
    assert run_python(program) == "sgl_kernel.any_kernel runs on CUDA alone\n"


def test_the_environments_own_customisation_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the own one runs')")
    assert run_python("print('then the program')", tmp_path) == "the own one runs\nthen the program\n"


def test_another_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("from sglang.version import __version__")
    (tmp_path / "sglang" / "version.py").write_text("__version__ = '9'")
    (tmp_path / "sglang-9.dist-info").mkdir()
    (tmp_path / "sglang-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9\n")
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_python("import sglang", tmp_path)
    assert "sglang = 9: servers on a machine without CUDA need patches, which were reviewed for" in error.value.stderr


@needs_sglang
@pytest.mark.parametrize(
    ("place", "needs"),
    [
        ("srt/mem_cache/pool_host/common.py", "_cuda_host_register(buffer, "),
        ("srt/utils/weight_checker.py", "        torch.cuda.synchronize()\n        start = "),
        ("srt/mem_cache/allocation.py", "if _is_cpu:\n    from sgl_kernel import assign_req_to_token_pool_cpu"),
        ("kernels/ops/kvcache/cache_move.py", "if _is_cpu:\n    from sgl_kernel import copy_all_layer_kv_cache_cpu"),
        ("srt/models/registry.py", "if external_pkg := envs.SGLANG_EXTERNAL_MODEL_PACKAGE.get():"),
        ("srt/layers/vocab_parallel_embedding.py", "@torch.compile("),
        (
            "srt/distributed/device_communicators/pynccl.py",
            "        try:\n            self.nccl = NCCLLibrary(library_path)",
        ),
    ],
)
def test_sglang_still_needs_it(place: str, needs: str) -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / place).read_text()
    assert needs in source, "SGLang changed: is the part of sglang_cpu_shim that this was for still needed?"


@needs_sglang
def test_the_installed_release_is_the_reviewed_one() -> None:
    assert f'REVIEWED_SGLANG = "{importlib.metadata.version("sglang")}"' in (SHIM / "sitecustomize.py").read_text()
