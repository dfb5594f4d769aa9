"""Times checkpoints of the actor, beside a plain copy of as many bytes: how long they hold the training loop up.

One rank trains a random float32 Qwen2 model, whose state (weights and two moments) is --mib large:

- synchronous: save, and wait until the checkpoint is complete
- asynchronous: what holds the loop up is staging, at the beginning, and completing, at the end; steps go on in between
- steps: without a save, and while one is written
- file copy: as many bytes from one file to another, and onto the disk

A round does each once. Files go under --folder, which must have room for four times the state.

    python tools/benchmark_checkpoint.py [--mib 1024] [--rounds 3] [--tokens 512] [--threads 1] [--folder FOLDER]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.actor.checkpoint import ActorCheckpoint
from megatron_fipo.actor.forward import ActorForward
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.model import build_model, build_provider
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.context import build_parallel_context
from megatron_fipo.platform.device import collective_backend, compute_device
from megatron_fipo.runtime.logging import quiet_upstream
from megatron_fipo.trainer.checkpointing import Checkpointer
from megatron_fipo.types import TrainBatch

MIB = 1024**2
VOCAB_SIZE = 8192
HIDDEN_SIZE = 1024


def write_model(folder: Path, mib: int) -> None:
    """Write a random model whose float32 weights and moments take so many MiB or a little more."""
    per_layer = 3 * HIDDEN_SIZE**2 + 12 * HIDDEN_SIZE**2
    layers = -(-(mib * MIB // 12 - VOCAB_SIZE * HIDDEN_SIZE) // per_layer)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=max(1, layers),
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def random_batch(num_tokens: int) -> TrainBatch:
    """Sequences of 64 random tokens, half of them prompt."""
    count, draws = max(1, num_tokens // 64), np.random.default_rng(0)
    total = count * 64
    mask = np.tile(np.arange(64) >= 32, count)
    return TrainBatch(
        token_ids=draws.integers(0, VOCAB_SIZE, total).astype(np.int32),
        sequence_lengths=np.full(count, 64, dtype=np.int32),
        prompt_lengths=np.full(count, 32, dtype=np.int32),
        response_mask=mask,
        rollout_log_probs=np.where(mask, -9.0, 0.0).astype(np.float32),
        rewards=np.zeros(count, dtype=np.float32),
        advantages=draws.standard_normal(count).astype(np.float32),
        group_ids=np.zeros(count, dtype=np.int32),
        mini_batch_ids=np.zeros(count, dtype=np.int32),
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        temperature=1.0,
    )


class Training:
    """An actor and one batch, which it takes updates on."""

    def __init__(self, model: Path, num_tokens: int) -> None:
        grid = ParallelismConfig(max_tokens_per_micro_batch=4096)
        settings = ModelConfig(path=model, dtype="float32")
        context = build_parallel_context(grid, seed=0)
        bridge = HfBridge(model)
        provider = build_provider(bridge, settings, grid, context)
        chunks = build_model(provider, bridge, grid, context)
        forward = ActorForward(chunks, provider, settings, context, bridge.vocab_size, temperature=1.0)
        optimizer = ActorOptimizer(chunks, OptimizerConfig(), bf16=False)
        self.train_step = TrainStep(forward, optimizer, FipoConfig(), context)
        (self.update,) = shard_micro_batches(random_batch(num_tokens), packing_rules(grid), context, compute_device())
        self._set_old_log_probs(forward, self.update)
        self.checkpoint = ActorCheckpoint(chunks, optimizer, context)

    @staticmethod
    def _set_old_log_probs(forward: ActorForward, update: list[MicroBatch]) -> None:
        for micro_batch, log_probs in zip(update, forward.log_probs(update), strict=True):
            micro_batch.old_log_probs = log_probs

    def step(self) -> None:
        """One update."""
        self.train_step.update(self.update)


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def save(own: Checkpointer, step: int) -> None:
    """Write the actor alone."""
    own.begin(step)
    own.complete(step, lambda folder: None)


def copy_file(source: Path, target: Path) -> None:
    """Copy, and wait for the disk."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def measure(training: Training, scratch: Path, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """The bytes of a checkpoint, and seconds by what took them, after one round that does not count."""
    own = {
        name: Checkpointer(
            CheckpointConfig(keep_last=1, asynchronous=behind),
            training.checkpoint.context,
            training.checkpoint,
            scratch / name,
        )
        for name, behind in (("synchronous", False), ("asynchronous", True))
    }
    source = scratch / "bytes"
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        # What was written before would else be written to the disk in the next one's time.
        os.sync()
        steps = [timed(training.step) for _ in range(3)]
        whole = timed(partial(save, own["synchronous"], number))
        os.sync()
        begin = timed(partial(save, own["asynchronous"], number))
        start, overlapped = time.perf_counter(), []
        while not own["asynchronous"].is_written:
            overlapped.append(timed(training.step))
        behind = time.perf_counter() - start
        end = timed(own["asynchronous"].finish)
        if number == 0:
            with source.open("wb") as file:
                file.write(bytes(training.checkpoint.num_bytes))
        os.sync()
        copy = timed(lambda: copy_file(source, scratch / "copy"))
        if number:
            seconds["synchronous save"].append(whole)
            seconds["asynchronous, loop held up"].append(begin + end)
            seconds["  of which staging"].append(begin)
            seconds["  of which completing"].append(end)
            seconds["asynchronous, in the background"].append(behind)
            seconds["step, no save"] += steps
            seconds["step, overlapped"] += overlapped
            seconds["file copy"].append(copy)
    return training.checkpoint.num_bytes, dict(seconds)


def report(num_bytes: int, seconds: dict[str, list[float]], threads: int) -> str:
    """The table, as Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    medians = {name: statistics.median(each) for name, each in seconds.items() if each}
    lines = [
        f"{num_bytes / MIB:.0f} MiB · torch {torch.__version__} · {os.cpu_count()} CPUs, {threads} threads · {commit}",
        "",
        "| what | seconds, median | lowest to highest | MiB/s |",
        "|---|---:|---:|---:|",
    ]
    for name, median in medians.items():
        of_bytes = name in ("synchronous save", "asynchronous, in the background", "file copy")
        rate = f"{num_bytes / MIB / median:.0f}" if of_bytes else ""
        lines.append(f"| {name} | {median:.2f} | {min(seconds[name]):.2f} to {max(seconds[name]):.2f} | {rate} |")
    held_up = medians["asynchronous, loop held up"] / medians["synchronous save"]
    lines += ["", f"The loop is held up for {held_up:.1%} of a synchronous save's time."]
    if "step, overlapped" in medians:
        slower = medians["step, overlapped"] / medians["step, no save"] - 1
        lines.append(f"A step beside a save takes {slower:+.0%}.")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="weights and moments together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step")
    parser.add_argument("--threads", type=int, default=1, help="threads that a step computes with")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_upstream()
    with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=options.folder) as folder:
        scratch = Path(folder)
        dist.init_process_group(collective_backend(), init_method=f"file://{scratch}/store", rank=0, world_size=1)
        write_model(scratch / "model", options.mib)
        training = Training(scratch / "model", options.tokens)
        print(report(*measure(training, scratch, options.rounds), options.threads))


if __name__ == "__main__":
    main()
