"""Times log-probabilities from hidden states, forward and backward, and measures their peak memory, side by side.

Every side starts from the same hidden states and output matrix and ends with the gradients of both. The sides take
turns in one process, with one tensor-parallel rank:

- megatron-fipo: `linear_log_probs`, which gives the entropy, too; with its logits kept, and computed again
- torch: float32 `log_softmax` of all logits, and a gather
- megatron-core: `vocab_parallel_cross_entropy` of all logits

    python tools/benchmark_log_probs.py [--tokens 2048] [--vocab 32000] [--hidden 512] [--dtype float32] [--threads 1]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_fipo.actor.log_probs import DEFAULT_CHUNK_TOKENS, VocabularyShard, linear_log_probs
from megatron_fipo.platform.device import DTYPES, collective_backend, compute_device

MIB = 1024**2


@dataclass(frozen=True)
class Problem:
    """Hidden states [n, h], output matrix [V, h] and targets [n], and what the log-probabilities' gradient is."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor

    @property
    def logits_bytes(self) -> int:
        """One copy of the logits in the compute dtype."""
        return len(self.hidden) * len(self.weight) * self.hidden.itemsize

    @property
    def gradient_bytes(self) -> int:
        """What every side has to return."""
        return (self.hidden.numel() + self.weight.numel()) * self.hidden.itemsize


Side = Callable[[Problem], Tensor]


def main() -> None:
    """Measure all sides in turn and print the table."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(collective_backend(), init_method=f"file://{folder}/store", rank=0, world_size=1)
        problem = make_problem(options.tokens, options.vocab, options.hidden, DTYPES[options.dtype])
        sides = make_sides(options.chunk)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                measured = time_once(side, problem)
                if number:  # the first round warms up
                    seconds[name].append(measured)
        memory = {name: working_bytes(side, problem) for name, side in sides.items()}
        dist.destroy_process_group()
    report = summarise(seconds, memory, problem, options)
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of the micro-batch")
    parser.add_argument("--vocab", type=int, default=32_000, help="rows of the output matrix")
    parser.add_argument("--hidden", type=int, default=512, help="size of a hidden state")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--chunk", type=int, default=DEFAULT_CHUNK_TOKENS, help="our tokens per chunk")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one")
    parser.add_argument("--output", type=Path, help="also write the table here")
    return parser.parse_args()


def make_problem(num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> Problem:
    """Random inputs whose logits are about as spread as a model's."""
    generator, device = torch.Generator().manual_seed(0), compute_device()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Problem(
        hidden=draw(num_tokens, hidden_size).to(device, dtype).requires_grad_(),
        weight=(2 * hidden_size**-0.5 * draw(vocab_size, hidden_size)).to(device, dtype).requires_grad_(),
        targets=torch.randint(vocab_size, (num_tokens,), generator=generator).to(device),
        upstream=draw(num_tokens).to(device),
    )


def make_sides(chunk_tokens: int) -> dict[str, Side]:
    """What is compared, by name; ours first."""

    def ours(problem: Problem, recompute_logits: bool = False) -> Tensor:
        assert dist.group.WORLD is not None
        shard = VocabularyShard(start=0, vocab_size=len(problem.weight), group=dist.group.WORLD)
        log_probs, _ = linear_log_probs(
            problem.hidden,
            problem.weight,
            problem.targets,
            shard,
            chunk_tokens=chunk_tokens,
            recompute_logits=recompute_logits,
        )
        return log_probs

    def torch_alone(problem: Problem) -> Tensor:
        logits = torch.mm(problem.hidden, problem.weight.t()).float()
        return logits.log_softmax(dim=-1).gather(1, problem.targets[:, None]).squeeze(1)

    def megatron_core(problem: Problem) -> Tensor:
        logits = torch.mm(problem.hidden, problem.weight.t())[:, None]
        losses: Tensor = vocab_parallel_cross_entropy(logits, problem.targets[:, None], tp_group=dist.group.WORLD)
        return -losses.squeeze(1)

    return {
        "megatron-fipo": ours,
        "megatron-fipo, logits computed again": lambda problem: ours(problem, recompute_logits=True),
        "torch": torch_alone,
        "megatron-core": megatron_core,
    }


def forget_gradients(problem: Problem) -> None:
    """Every measurement begins without them."""
    problem.hidden.grad = problem.weight.grad = None


def time_once(side: Side, problem: Problem) -> tuple[float, float]:
    """Seconds of forward and backward."""
    forget_gradients(problem)
    moments = [now()]
    log_probs = side(problem)
    moments.append(now())
    log_probs.backward(problem.upstream.to(log_probs.dtype))
    moments.append(now())
    return moments[1] - moments[0], moments[2] - moments[1]


def now() -> float:
    """Seconds, with nothing left to do on the device; on the CPU the process's own, whatever else runs beside it.

    With several threads these are the sum over all of them, waiting ones included.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before: the most at a time, and what was left at the end."""

    peak: int
    left: int


def measure_memory(action: Callable[[], object]) -> Memory:
    """Memory of `action`, by the allocator's own account."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = action()
        torch.cuda.synchronize()
        memory = Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
        del result
        return memory
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    del result
    events = sorted((event for event in trace if event["name"] == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    before = totals[0] - events[0]["args"]["Bytes"]
    return Memory(max(totals) - before, totals[-1] - before)


def working_bytes(side: Side, problem: Problem) -> int:
    """Most that a side needs at a time between its inputs and the gradients that it returns."""
    forget_gradients(problem)
    results: list[Tensor] = []
    forward = measure_memory(lambda: results.append(side(problem)))
    (log_probs,) = results
    upstream = problem.upstream.to(log_probs.dtype)
    backward = measure_memory(lambda: log_probs.backward(upstream))
    return max(forward.peak, forward.left + backward.peak - problem.gradient_bytes)


def summarise(
    seconds: dict[str, list[tuple[float, float]]],
    memory: dict[str, int],
    problem: Problem,
    options: argparse.Namespace,
) -> str:
    """A Markdown table: medians, and ratios of ours to each of the others, round by round."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)"
    ours, copy = next(iter(seconds)), problem.logits_bytes
    lines = [
        f"commit {commit.stdout.strip()}, {device}, {platform.machine()}, torch {torch.__version__}, "
        f"{options.threads} threads, {options.rounds} rounds",
        f"{options.tokens} tokens × {options.vocab} rows × {options.hidden}, {options.dtype}: "
        f"one copy of the logits is {copy / MIB:.0f} MiB",
        "",
        "| | forward, s | backward, s | both, s | first to this one: median (range) | peak, MiB | in copies of them |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pairs in seconds.items():
        forward, backward = (statistics.median(part) for part in zip(*pairs, strict=True))
        total = statistics.median(sum(pair) for pair in pairs)
        ratios = [sum(mine) / sum(theirs) for mine, theirs in zip(seconds[ours], pairs, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if name != ours else ""
        lines.append(
            f"| {name} | {forward:.3f} | {backward:.3f} | {total:.3f} | {ratio} "
            f"| {memory[name] / MIB:.0f} | {memory[name] / copy:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
