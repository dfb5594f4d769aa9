"""Times conversions of a model of a given shape, with the memory that they take, beside a plain copy.

The model has random bfloat16 weights, written tensor by tensor. A round converts a checkpoint into a Hugging Face
folder, the folder into a checkpoint, and copies the checkpoint with `cp`, in turns; each ends on the disk. Conversions
are processes of their own with one rank, without the comparison of logits, which is timed once at the end (--logits).

Memory is a process's peak of anonymous and shared memory (RssAnon + RssShmem, read every 20 ms) and of its resident set
(VmHWM), which the kernel keeps and which has mapped library files in it. Neither has the page cache of files that are
read or written, since these are not mapped.

Needs room for three times the model. Everything is written under --folder and removed.

    python tools/benchmark_convert.py [--shape qwen2.5-7b] [--layers N] [--rounds 2] [--max-file-gib 5] --folder FOLDER
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.actor.checkpoint_stream import write_tensor_file, write_tensor_index
from megatron_fipo.conversion.model_files import MODEL_FOLDER, read_architecture, write_json_file, write_model_files
from megatron_fipo.conversion.tensor_map import Link, tensor_map
from megatron_fipo.runtime.checkpoint_store import write_manifest
from megatron_fipo.trainer.checkpointing import ACTOR_FOLDER

GIB = 1024**3
_SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}
_COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Run:
    """What a process took.

    Attributes:
        seconds: From its start to its end, imports included.
        anonymous: Peak of its own memory, bytes.
        resident: Peak of its resident set, bytes.
        output: What it said.
    """

    seconds: float
    anonymous: int
    resident: int
    output: str


def random_tensors(links: Sequence[Link], pool: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Weights as a checkpoint has them: norms near 1, the rest from a pool of random numbers, begun at other places."""
    for number, link in enumerate(links):
        if len(link.shape) == 1 and "norm" in link.name:
            yield link.name, torch.ones(link.shape, dtype=torch.bfloat16)
            continue
        tensor = torch.empty(link.shape, dtype=torch.bfloat16)
        start = number * 7919 % len(pool)
        for block in tensor.view(-1).split(len(pool)):
            block.copy_(pool.roll(-start)[: len(block)])
        yield link.name, tensor


def write_checkpoint(folder: Path, config: dict[str, Any], max_file_bytes: int) -> int:
    """Write a checkpoint of random weights, file by file; returns the bytes of its weights."""
    source = folder.with_name("description")
    source.mkdir()
    write_json_file(source / "config.json", config)
    links = tensor_map(read_architecture(source))
    (folder / ACTOR_FOLDER).mkdir(parents=True)
    write_model_files(folder / MODEL_FOLDER, source, config)
    sizes = [2 * sum(tensor.num_elements for tensor in link.hf) for link in links]
    files, start, filled = [], 0, 0
    for number, size in enumerate(sizes):
        if filled and filled + size > max_file_bytes:
            files.append(links[start:number])
            start, filled = number, 0
        filled += size
    files.append(links[start:])
    pool = torch.empty(2**24 - 3, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    records, places = {}, []
    for number, part in enumerate(files):
        record, found = write_tensor_file(folder / ACTOR_FOLDER, number, random_tensors(part, pool))
        records[f"{ACTOR_FOLDER}/__{number}_0.distcp"] = record
        places += found
    write_tensor_index(folder / ACTOR_FOLDER, places)
    write_manifest(folder, 1, {}, records)
    return sum(sizes)


def run(words: Sequence[str]) -> Run:
    """Run a process to its end and watch its memory."""
    with tempfile.TemporaryFile("w+") as said:
        start = time.monotonic()
        process = subprocess.Popen(words, stdout=said, stderr=said)
        anonymous = resident = 0
        while process.poll() is None:
            now_anonymous, now_resident = _memory(process.pid)
            anonymous, resident = max(anonymous, now_anonymous), max(resident, now_resident)
            time.sleep(0.02)
        seconds = time.monotonic() - start
        said.seek(0)
        output = said.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{output}")
    return Run(seconds, anonymous, resident, output)


def _memory(process: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    told = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if "kB" in value
    }
    return told.get("RssAnon", 0) + told.get("RssShmem", 0), told.get("VmHWM", 0)


def convert(*words: object) -> Run:
    """Run `megatron-fipo convert`."""
    return run([sys.executable, "-m", "megatron_fipo.cli", "convert", *map(str, words)])


def copy(source: Path, target: Path) -> Run:
    """Copy a folder with cp and wait for the disk, as conversions do."""
    return run(["sh", "-c", f"cp -r '{source}' '{target}' && sync -f '{target}'"])


@contextmanager
def removed(*folders: Path) -> Iterator[None]:
    """Remove folders afterwards."""
    try:
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def measure(root: Path, arguments: argparse.Namespace) -> None:
    """Measure and print."""
    config = {**_COMMON, **_SHAPES[arguments.shape]}
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    checkpoint, exported, back, copied = (root / name for name in ("checkpoint", "hf", "back", "copy"))
    start = time.monotonic()
    num_bytes = write_checkpoint(checkpoint, config, int(arguments.max_file_gib * GIB))
    largest = max(path.stat().st_size for path in checkpoint.rglob("*"))
    print(f"{arguments.shape}, {config['num_hidden_layers']} layers: {num_bytes / 2e9:.2f} G parameters, ", end="")
    print(f"{num_bytes / GIB:.2f} GiB, largest file {largest / GIB:.2f} GiB, ", end="")
    print(f"written in {time.monotonic() - start:.0f} s", flush=True)
    idle = run([sys.executable, "-c", "import megatron_fipo.trainer.convert.command"])
    print(
        f"imports alone: {idle.seconds:.1f} s, {idle.anonymous / GIB:.2f} GiB, {idle.resident / GIB:.2f} GiB",
        flush=True,
    )
    size = ["--max-file-gib", arguments.max_file_gib]
    runs: dict[str, list[Run]] = {}

    def note(name: str, each: Run) -> None:
        runs.setdefault(name, []).append(each)
        print(name, _row([each], num_bytes), flush=True)

    for _ in range(arguments.rounds):
        with removed(exported, back):
            note("to-hf", convert("to-hf", checkpoint, exported, *size, "--verify", "nothing", "--trust-checkpoint"))
            with removed(copied):
                note("cp", copy(checkpoint, copied))
            note("to-megatron", convert("to-megatron", exported, back, *size, "--verify", "nothing"))
    with removed(exported):
        note("to-hf, hashes of both compared", convert("to-hf", checkpoint, exported, *size, "--verify", "bytes"))
    print("\n| | seconds | GiB/s | own memory GiB | resident GiB |\n|---|---|---|---|---|")
    for name, each in runs.items():
        print(f"| {name} | {_row(each, num_bytes)} |")
    if arguments.logits:
        words = ["--verify", "logits", "--trust-checkpoint", "--memory-gib", arguments.logits]
        one = convert("to-hf", checkpoint, exported, *size, *words)
        print(f"| to-hf, logits compared, {arguments.logits} GiB for models | {_row([one], num_bytes)} |")
        print("\n".join(line for line in one.output.splitlines() if "logits" in line))


def _row(runs: Sequence[Run], num_bytes: int) -> str:
    seconds = statistics.median(each.seconds for each in runs)
    own, resident = max(each.anonymous for each in runs), max(each.resident for each in runs)
    return f"{seconds:.1f} | {num_bytes / GIB / seconds:.2f} | {own / GIB:.2f} | {resident / GIB:.2f}"


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=_SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="other number of layers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-file-gib", type=float, default=5.0)
    parser.add_argument("--logits", type=float, default=0.0, metavar="X", help="compare logits, too, in so many GiB")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    root = Path(tempfile.mkdtemp(prefix="benchmark_convert_", dir=arguments.folder))
    with removed(root):
        print(json.dumps({key: str(value) for key, value in vars(arguments).items()}))
        measure(root, arguments)


if __name__ == "__main__":
    main()
