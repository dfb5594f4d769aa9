"""The package as users install it: what the wheel holds, and the losses in an environment that has torch alone."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Its last line is a JSON object; `-I` keeps the checkout and the caller's environment out.
PROBE = """
import importlib, json, pkgutil, sys, torch, typing
own = set(sys.modules)
from megatron_fipo.algorithms import losses
from megatron_fipo.algorithms.advantages import group_relative_advantages
from megatron_fipo.algorithms.future_kl.scan import future_kl
from megatron_fipo.config.algorithm import FIPO_PRESETS, AlgorithmConfig, FipoConfig
import megatron_fipo.algorithms

torch.manual_seed(0)
old = torch.randn(4, 90) * 0.1 - 1
mask = torch.arange(90) < torch.tensor([[90], [64], [7], [0]])
advantages = group_relative_advantages(torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.zeros(4, dtype=torch.int64))
baselines = [each for each in typing.get_args(AlgorithmConfig) if each is not FipoConfig]
calls = {name: (losses.fipo_loss, FipoConfig.preset(name)) for name in FIPO_PRESETS}
fields = {"DrGrpoConfig": {"length_divisor": 90}}
for each in baselines:
    config = each(reference_kl_coefficient=0.01, **fields.get(each.__name__, {}))
    calls[each.__name__] = (losses.policy_loss_on_rows, config)
found = {}
for name, (loss, config) in calls.items():
    log_probs = (old + 0.05 * torch.randn(4, 90)).requires_grad_()
    out = loss(log_probs, old, advantages, mask, config, rollout_log_probs=old, reference_log_probs=old)
    out.loss.backward()
    found[name] = [float(out.loss.detach()), float(log_probs.grad.norm()), len(out.metrics)]
found["scan"] = future_kl(torch.ones(5), 1.0, [0, 3, 5]).tolist()
kernels = []
for module in pkgutil.walk_packages(megatron_fipo.algorithms.__path__, "megatron_fipo.algorithms."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] == "triton", module.name
        kernels.append(module.name)
new = {name.partition(".")[0] for name in set(sys.modules) - own} - set(sys.stdlib_module_names)
print(json.dumps({"found": found, "imported": sorted(new), "kernels": kernels, "from": losses.__file__}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from links to the checkout, so that the build leaves nothing in it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.suffix != ".egg-info" and path.name != "build":
            (source / path.name).symlink_to(path)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, output], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("*.whl")
    return path


def environment_of(requirement: str, folder: Path) -> Path:
    """Make a virtual environment of one distribution and what it requires, as links; returns its site-packages.

    Triton is left out: only PyTorch's builds for CUDA ask for it.
    """
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    waiting, seen = [requirement], {"triton"}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(Path(str(distribution.locate_file(top))))
        waiting += required(distribution.requires or [])
    return site_packages


def required(lines: list[str], extra: str = "") -> list[str]:
    """Names of the requirements that apply here."""
    requirements = [Requirement(line) for line in lines]
    return [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})]


def test_the_wheel_holds_the_package_and_requires_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (information,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(information).decode())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"megatron_fipo", information.partition("/")[0]}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_fipo").rglob("*.py")}
    assert {name for name in names if name.startswith("megatron_fipo/")} == modules

    lines = metadata.get_all("Requires-Dist")
    assert required(lines) == ["torch"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    for extra, wanted in PROJECT["optional-dependencies"].items():
        assert sorted(required(lines, extra)) == sorted(["torch", *required(wanted)])
    assert metadata["Requires-Python"] == PROJECT["requires-python"]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and torch."""
    folder = tmp_path_factory.mktemp("environment")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(environment_of("torch", folder))
    return folder / "bin" / "python"


def test_the_losses_run_where_there_is_torch_alone(python: Path) -> None:
    (site_packages,) = python.parents[1].glob("lib/python*/site-packages")
    installed = [path.name for path in site_packages.iterdir()]
    assert not {"numpy", "triton", "pydantic", "yaml", "megatron", "transformers"} & set(installed)
    done = subprocess.run([python, "-I", "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert there["from"].startswith(str(site_packages))
    assert there["imported"] == ["megatron_fipo"]
    # Triton comes with the builds that have a use for it.
    assert set(there["kernels"]) <= {"megatron_fipo.algorithms.future_kl.kernel_programs"}

    # The same numbers as beside NumPy and everything else.
    here = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}
    )
    assert there["found"] == json.loads(here.stdout.splitlines()[-1])["found"]
    assert there["found"]["scan"] == [1.75, 1.5, 1.0, 1.5, 1.0]


@pytest.mark.parametrize("command", ["check", "train", "evaluate", "inspect"])
def test_a_command_names_the_extra_that_it_needs(python: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "config.yaml").write_text("num_steps: 1\n")
    words = [python, "-I", "-m", "megatron_fipo.cli", command, tmp_path if command == "inspect" else "config.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-fipo: No module named '"), done.stderr
    assert "pip install 'megatron-fipo[train]'" in done.stderr
