"""Times how a run's prompts are opened: a JSONL or Parquet file of many rows, seen for the first time.

The file is made first, and read in a process of its own that is bound to a few cores. Its extra memory is the growth of
its resident set, at its peak, over what Python, NumPy and transformers take, plus the whole of the worker processes.

    python tools/benchmark_data_index.py [--rows 1000000] [--format jsonl|parquet] [--repeats 1] [--cores 2]
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fipo.config.data import DataConfig, JsonlPrompts, ParquetPrompts
from megatron_fipo.data.stream import PromptStream

_MIB = 2**20
_DRAWS = 512


def main() -> None:
    """Make the file, read it in another process and print what that took."""
    options = parse_options()
    if options.file:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"problems.{options.format}"
        write_parquet(path, options) if options.format == "parquet" else write_jsonl(path, options)
        child = [sys.executable, __file__, *sys.argv[1:], "--file", str(path)]
        result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    print(
        f"{options.format}, {options.rows:,} rows, {result['bytes'] / options.rows:.0f} bytes a row, "
        f"{result['prompts']:,} prompts, {options.cores} cores\n"
        f"  open: {result['open_s']:.2f} s, {result['open_cpu_s']:.2f} s of processor time\n"
        f"  extra memory: {result['own_mib']:.0f} MiB, and {result['workers_mib']:.0f} MiB for worker processes\n"
        f"  draw {_DRAWS} prompts: {result['draw_s']:.3f} s"
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--repeats", type=int, default=1, help="how often the whole set of rows comes in the file")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Problems of 20 to 60 words with their answers."""
    words = ["".join(random.Random(word).choices("abcdefghijklm", k=2 + word % 8)) for word in range(5000)]
    for _ in range(options.repeats):
        draw = random.Random(0)
        for number in range(options.rows // options.repeats):
            text = " ".join(draw.choices(words, k=draw.randint(20, 60)))
            yield f"Problem {number}: {text}", str(draw.randrange(10**6))


def write_jsonl(path: Path, options: argparse.Namespace) -> None:
    """Write the rows with a column besides."""
    with path.open("w") as file:
        for prompt, answer in rows(options):
            file.write(json.dumps({"prompt": prompt, "answer": answer, "origin": "benchmark"}) + "\n")


def write_parquet(path: Path, options: argparse.Namespace) -> None:
    """Write the rows with the columns of DAPO-Math-17k, in row groups of a million."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [
        {
            "prompt": [{"content": prompt, "role": "user"}],
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "data_source": "benchmark",
        }
        for prompt, answer in rows(options)
    ]
    pq.write_table(pa.Table.from_pylist(content), path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Open the file and draw from it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    source = (ParquetPrompts if options.format == "parquet" else JsonlPrompts)(path=options.file)
    config = DataConfig(train=source)
    tokenizer = byte_tokenizer()
    # From here on, the peak is that of what follows.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    with WorkerMemory() as workers:
        start, start_cpu = time.perf_counter(), cpu_seconds()
        stream = PromptStream(config, tokenizer, seed=1)
        opened, opened_cpu = time.perf_counter(), cpu_seconds()
    own = memory_mib("VmHWM") - before
    resumed = time.perf_counter()
    stream.next(_DRAWS)
    drawn = time.perf_counter()
    return {
        "bytes": options.file.stat().st_size,
        "prompts": stream.num_prompts,
        "open_s": opened - start,
        "open_cpu_s": opened_cpu - start_cpu,
        "draw_s": drawn - resumed,
        "own_mib": own,
        "workers_mib": workers.peak_mib,
    }


class WorkerMemory:
    """Watches the resident sets of all child processes together.

    Attributes:
        peak_mib: The largest sum that was met.
    """

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "WorkerMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.02):
            sizes = []
            for child in process.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    sizes.append(child.memory_info().rss / _MIB)
            self.peak_mib = max(self.peak_mib, sum(sizes))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with a chat template, which needs no files."""
    vocabulary = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def cpu_seconds() -> float:
    """Processor time of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def memory_mib(key: str) -> float:
    """A line of this process's status in MiB: VmRSS is the resident set, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / _MIB for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
