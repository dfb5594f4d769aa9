"""Times one optimizer step of the megatron-core actor against a plain transformers + PyTorch step.

Both sides train the same model on the same batch with the same clipped policy loss (DAPO), Adam and gradient clipping,
at the same number of threads, each in a process of its own, taking turns. The plain side is what a careful user would
write: one padded batch, SDPA, the output layer on response positions alone, fused AdamW.

    python tools/benchmark_train_step.py --model FOLDER [--sequences 64] [--threads 2] [--rounds 3] [--output FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("megatron-fipo", "plain")


def main() -> None:
    """Run both sides in turn and print the table."""
    options = parse_options()
    if options.side:
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            results[side].append(run_side(side))
    report = summarise(results, options)
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--sequences", type=int, default=64, help="sequences in the batch")
    parser.add_argument("--prompt", type=int, default=9, help="prompt tokens of every sequence")
    parser.add_argument("--shortest", type=int, default=16, help="shortest response, in tokens")
    parser.add_argument("--longest", type=int, default=64, help="longest response, in tokens")
    parser.add_argument("--pack", type=int, default=4096, help="token budget of one micro-batch of ours")
    parser.add_argument("--threads", type=int, default=2, help="threads of either side")
    parser.add_argument("--updates", type=int, default=8, help="counted updates in one process, after two")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="also write the table here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_side(side: str) -> dict[str, Any]:
    """Measure one side in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{side} failed:\n{finished.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return result


def summarise(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """A Markdown table with medians, and the ratio of ours to the plain side."""
    import torch

    def median(side: str, key: str) -> float:
        return statistics.median(round_[key] for round_ in results[side])

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)"
    ratios = {
        key: [ours[key] / plain[key] for ours, plain in zip(*(results[side] for side in SIDES), strict=True)]
        for key in ("seconds", "peak_mib", "working_mib")
    }
    lines = [
        f"commit {commit.stdout.strip()}, {device}, {platform.machine()}, torch {torch.__version__}, "
        f"{options.threads} threads, {options.dtype}, {options.rounds} processes each",
        f"{options.sequences} sequences, prompt {options.prompt}, responses {options.shortest}–{options.longest}, "
        f"{results['plain'][0]['tokens']} tokens; loss {results['megatron-fipo'][0]['loss']:.6f} against "
        f"{results['plain'][0]['loss']:.6f}",
        "",
        "| | update, s | tokens/s | peak memory, MiB | of it above the process without a model, MiB |",
        "|---|---|---|---|---|",
    ]
    for side in SIDES:
        seconds = median(side, "seconds")
        tokens = results[side][0]["tokens"]
        memory = f"{median(side, 'peak_mib'):.0f} | {median(side, 'working_mib'):.0f}"
        lines.append(f"| {side} | {seconds:.3f} | {tokens / seconds:.0f} | {memory} |")
    spread = {
        key: f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        for key, values in ratios.items()
    }
    memory_spread = f"{spread['peak_mib']} | {spread['working_mib']}"
    lines.append(f"| ratio, pair by pair: median (range) | {spread['seconds']} | | {memory_spread} |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process: median seconds of an update and its peak memory."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    from megatron_fipo.runtime.logging import quiet_upstream

    quiet_upstream()
    build = build_ours if options.side == "megatron-fipo" else build_plain
    batch = make_batch(options)
    update, idle_mib = build(options, batch)
    first_loss = update()
    update()
    seconds = []
    for _ in range(options.updates):
        started = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "peak_mib": peak_mib(),
        "working_mib": peak_mib() - idle_mib,
        "tokens": int(batch.sequence_lengths.sum()),
        "loss": first_loss,
    }


def peak_mib() -> float:
    """Peak memory of this process so far."""
    from megatron_fipo.platform.device import peak_memory_bytes

    return peak_memory_bytes() / 1024**2


def make_batch(options: argparse.Namespace) -> Any:
    """The same random batch for both sides."""
    import numpy as np

    from megatron_fipo.types import TrainBatch

    draws = np.random.default_rng(0)
    responses = draws.integers(options.shortest, options.longest + 1, options.sequences).astype(np.int32)
    lengths = responses + options.prompt
    prompts = np.full(options.sequences, options.prompt, dtype=np.int32)
    mask = np.concatenate([np.arange(length) >= options.prompt for length in lengths])
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    total, zeros = int(lengths.sum()), np.zeros(options.sequences, dtype=np.int32)
    return TrainBatch(
        token_ids=draws.integers(0, vocab_size, total).astype(np.int32),
        sequence_lengths=lengths,
        prompt_lengths=prompts,
        response_mask=mask,
        rollout_log_probs=np.zeros(total, dtype=np.float32),
        rewards=draws.normal(size=options.sequences).astype(np.float32),
        advantages=draws.normal(size=options.sequences).astype(np.float32),
        group_ids=np.arange(options.sequences, dtype=np.int32) // 8,
        mini_batch_ids=zeros,
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        temperature=1.0,
    )


def build_ours(options: argparse.Namespace, batch: Any) -> tuple[Any, float]:
    """Our update on one rank, and the memory of the process before the model is built."""
    import torch.distributed as dist

    from megatron_fipo.actor.forward import ActorForward
    from megatron_fipo.actor.model import build_model, build_provider
    from megatron_fipo.actor.optimizer import ActorOptimizer
    from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
    from megatron_fipo.actor.train_step import TrainStep
    from megatron_fipo.config.baselines import DapoConfig
    from megatron_fipo.config.model import ModelConfig
    from megatron_fipo.config.optimizer import OptimizerConfig
    from megatron_fipo.config.parallelism import ParallelismConfig
    from megatron_fipo.conversion.bridge import HfBridge
    from megatron_fipo.parallel.context import build_parallel_context
    from megatron_fipo.platform.device import collective_backend, compute_device

    store = f"file://{tempfile.mkdtemp()}/store"
    dist.init_process_group(collective_backend(), init_method=store, rank=0, world_size=1)
    parallelism = ParallelismConfig(max_tokens_per_micro_batch=options.pack)
    context = build_parallel_context(parallelism, 1)
    model = ModelConfig(path=options.model, dtype=options.dtype)
    bridge = HfBridge(options.model)
    idle_mib = peak_mib()
    provider = build_provider(bridge, model, parallelism, context)
    chunks = build_model(provider, bridge, parallelism, context)
    forward = ActorForward(chunks, provider, model, context, bridge.vocab_size, 1.0)
    optimizer = ActorOptimizer(chunks, OptimizerConfig(warmup_steps=0), provider.bf16)
    step = TrainStep(forward, optimizer, DapoConfig(), context)
    micro_batches = shard_micro_batches(batch, packing_rules(parallelism), context, compute_device())[0]
    for micro_batch, log_probs in zip(micro_batches, forward.log_probs(micro_batches), strict=True):
        micro_batch.old_log_probs = log_probs
    return lambda: step.update(micro_batches).loss, idle_mib


def build_plain(options: argparse.Namespace, batch: Any) -> tuple[Any, float]:
    """The plain update, and the memory of the process before the model is built."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    idle_mib = peak_mib()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    rows = torch.from_numpy(batch.sequence_lengths).long()
    ids = torch.zeros(len(rows), int(rows.max()), dtype=torch.int64)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (start, stop) in enumerate(zip(batch.sequence_starts[:-1], batch.sequence_starts[1:], strict=True)):
        ids[row, : stop - start] = torch.from_numpy(batch.token_ids[start:stop]).long()
        counts[row, : stop - start] = torch.from_numpy(batch.response_mask[start:stop])
    attention = (torch.arange(ids.shape[1]) < rows[:, None]).long().to(device)
    ids, counts = ids.to(device), counts[:, 1:].to(device)
    advantages = torch.from_numpy(batch.advantages).to(device)[:, None].expand(counts.shape)[counts]

    def log_probs() -> torch.Tensor:
        hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][counts]).float()
        chosen = logits.gather(1, ids[:, 1:][counts][:, None]).squeeze(1)
        return chosen - logits.logsumexp(dim=-1)

    with torch.no_grad():
        old = log_probs()

    def update() -> float:
        optimizer.zero_grad(set_to_none=True)
        ratio = (log_probs() - old).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return update, idle_mib


if __name__ == "__main__":
    main()
