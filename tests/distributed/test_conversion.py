"""Model folder → actor → the same tensors, bit by bit, whatever the process grid."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor.model import unwrap
from megatron_fipo.config.base import ConfigError
from megatron_fipo.conversion import bridge as conversion
from megatron_fipo.conversion.model_files import check_tied_output
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import bits, folder_tensors, tiny_actor
from tests.tiny_models import VOCAB_SIZE, add_output_matrix, write_tiny_model

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"architecture": "qwen2"},
    "qwen2": {"architecture": "qwen2", "tied": False},
    "qwen3": {"architecture": "qwen3"},
    "qwen3_moe": {"architecture": "qwen3_moe"},
    "llama": {"architecture": "llama", "tied": False},
}

# The vocabulary of 301 does not divide, so that every tensor-parallel layout has padding rows.
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
ETP = SP | {"expert_tensor_parallel_size": 2}

CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    1: {model: (model, {}) for model in MODELS},
    2: {
        **{f"{model}, TP 2": (model, SP) for model in MODELS},
        "qwen2, tied, TP 2 without SP": ("qwen2, tied", TP),
        "qwen2, tied, PP 2": ("qwen2, tied", PP),
        "qwen2, PP 2": ("qwen2", PP),
        "qwen2, tied, PP 2 × VPP 2": ("qwen2, tied", VPP),
        "qwen3_moe, EP 2": ("qwen3_moe", EP),
        "qwen3_moe, TP 2, ETP 2": ("qwen3_moe", ETP),
        "qwen3_moe, DP 2": ("qwen3_moe", {}),
    },
    4: {
        "qwen2, tied, TP 2 × PP 2": ("qwen2, tied", SP | PP),
        "qwen2, tied, TP 2 × DP 2": ("qwen2, tied", SP),
        "llama, TP 2 × VPP 2": ("llama", SP | VPP),
        "qwen3_moe, PP 2 × EP 2": ("qwen3_moe", PP | EP),
        "qwen3_moe, TP 2 × EP 2": ("qwen3_moe", SP | EP),
        "qwen3, CP 2 × TP 2": ("qwen3", SP | {"context_parallel_size": 2}),
    },
}

Round = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("conversion")
    for name, options in MODELS.items():
        write_tiny_model(root / name, **options)
    return root


class CountingFile:
    """An open safetensors file that counts the tensors read from it."""

    def __init__(self, file: Any, reads: Counter[str]) -> None:
        self._file, self._reads = file, reads

    def __enter__(self) -> "CountingFile":
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def get_slice(self, key: str) -> Any:
        return self._file.get_slice(key)

    def get_tensor(self, key: str) -> torch.Tensor:
        self._reads[key] += 1
        return self._file.get_tensor(key)


def load_and_export(root: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Round]:
    """Per case: which tensors this rank read, which it exported, and which of those differ from the folder's."""
    # Memory that was never written reads as NaN.
    torch.use_deterministic_algorithms(True)
    safe_open, rounds = conversion.safe_open, {}
    for case, (model, parallelism) in cases.items():
        reads: Counter[str] = Counter()
        conversion.safe_open = lambda *args, reads=reads, **kwargs: CountingFile(safe_open(*args, **kwargs), reads)
        expected = folder_tensors(root / model)
        with tiny_actor(root / model, parallelism) as actor:
            # Twice: the second stream goes over what the first one prepared.
            for _ in range(2):
                exported = [(name, tensor.clone()) for name, tensor in actor.bridge.export(unwrap(actor.chunks))]
        rounds[case] = {
            "reads": reads,
            "names": [name for name, _ in exported],
            "different": [
                (name, tuple(tensor.shape), str(tensor.dtype))
                for name, tensor in exported
                if tensor.shape != expected[name].shape
                or tensor.dtype != expected[name].dtype
                or not torch.equal(bits(tensor), bits(expected[name]))
            ],
        }
    conversion.safe_open = safe_open
    return rounds


@pytest.fixture(scope="module")
def rounds(root: Path) -> dict[str, list[Round]]:
    """For every case what happened on every rank."""
    results: dict[str, list[Round]] = {}
    for world_size, cases in CASES.items():
        ranks = run_distributed(load_and_export, world_size, root, cases)
        results |= {case: [rank[case] for rank in ranks] for case in cases}
    return results


@pytest.mark.parametrize(
    ("case", "model"), [(case, model) for cases in CASES.values() for case, (model, _) in cases.items()]
)
def test_every_tensor_comes_back_bit_by_bit_on_every_rank(root, rounds, case, model):
    names = sorted(folder_tensors(root / model))
    for each in rounds[case]:
        assert sorted(each["names"]) == names
        assert each["names"] == rounds[case][0]["names"], "ranks stream in different orders"
        assert each["different"] == []


@pytest.mark.parametrize(
    ("case", "model"), [(case, model) for cases in CASES.values() for case, (model, _) in cases.items()]
)
def test_every_tensor_is_read_from_disk_once(root, rounds, case, model):
    reads = sum((each["reads"] for each in rounds[case]), Counter())
    assert reads == Counter(list(folder_tensors(root / model)))


def export_in_bfloat16(root: Path) -> dict[str, list[str]]:
    different = {}
    for dtype in ("float32", "bfloat16"):
        with tiny_actor(root / "qwen2, tied", SP, dtype=dtype) as actor:
            expected = folder_tensors(root / "qwen2, tied")
            different[dtype] = [
                name
                for name, tensor in actor.bridge.export(unwrap(actor.chunks), torch.bfloat16)
                if not torch.equal(bits(tensor), bits(expected.pop(name).bfloat16()))
            ] + list(expected)
    return different


def test_exports_in_bfloat16_are_rounded_once(root):
    for different in run_distributed(export_in_bfloat16, 2, root):
        assert different == {"float32": [], "bfloat16": []}


def test_models_have_padding_rows():
    assert VOCAB_SIZE % 2


def copy_with_config(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "no_such_model", "architectures": ["NoSuchModel"]}, "`no_such_model`"),
        ({"architectures": ["Qwen2ForTokenClassification"]}, "Qwen2ForTokenClassification"),
    ],
    ids=["unknown to transformers", "not a language model"],
)
def test_an_unknown_architecture_is_refused(root, tmp_path, changes, named):
    folder = copy_with_config(root / "qwen2", tmp_path / "model", **changes)
    with pytest.raises(ConfigError) as caught:
        conversion.HfBridge(folder)
    assert str(caught.value).startswith(f"model.path = {folder}: must be an architecture that megatron-bridge")
    assert named in caught.value.rule
    assert caught.value.way_out == "choose a supported architecture, such as Qwen2, Qwen3, Qwen3-MoE or Llama"


def error_of_loading(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, tiny_actor(folder):
        pass
    return str(caught.value)


def test_a_folder_without_a_needed_tensor_is_refused(root, tmp_path):
    folder = copy_with_config(root / "qwen2, tied", tmp_path / "model", tie_word_embeddings=False)
    assert run_distributed(error_of_loading, 1, folder) == [
        f"model.path = {folder}: lacks 1 tensors that the model needs, lm_head.weight first; "
        "fetch the model's weight files again, or check config.json (tie_word_embeddings?)"
    ]


def test_a_tied_output_matrix_must_be_the_embedding(root: Path, tmp_path: Path) -> None:
    folder = add_output_matrix(shutil.copytree(root / "qwen2, tied", tmp_path / "other"), 0.0)
    message = (
        f"model.path = {folder}: has lm_head.weight with other bytes, though config.json ties it to "
        "model.embed_tokens.weight (tie_word_embeddings); set tie_word_embeddings to false if both are meant, or else "
        "remove that tensor"
    )
    with pytest.raises(ConfigError) as caught:
        check_tied_output(folder)
    assert str(caught.value) == message
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(ConfigError, match=r"cannot be read \(.*: Input/output error\); mend that, or fetch"):
        check_tied_output(folder)


def test_a_tied_output_matrix_may_be_there_twice(root: Path, tmp_path: Path) -> None:
    folder = add_output_matrix(shutil.copytree(root / "qwen2, tied", tmp_path / "copy"), 1.0)
    for ranks in run_distributed(load_and_export, 1, tmp_path, {"twice": ("copy", {})}):
        assert ranks["twice"]["different"] == []
        assert sorted(ranks["twice"]["names"]) == sorted(folder_tensors(folder))
