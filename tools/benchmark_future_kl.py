"""Times the Future-KL against the forms it replaces, and across ranks against gathering first. Prints Markdown tables.

    python tools/benchmark_future_kl.py [--device cpu] [--threads 1] [--repeats 7] [--output FILE]

Forms, on the same float32 log-ratios and τ = 32:
  scan      `future_kl.scan.future_kl`, with the plan made anew in every call
  official  the released algorithm: for every 128 columns a decay block [L, 128], multiplied into a sum of [B, L]
  serial    F_t = Δ_t + γ·F_{t+1} in a loop over time, all rows at once
The forms take turns. The last two work on padded rows. Memory is the peak above what was held before the call, the
result included: on the CPU the growth of the resident set of a process that has made one small call before.

On CUDA a table of time on the device alone comes first: the scan's kernel, the kernel fused with mask and influence
weight, a Triton loop over time and the official form, each beside a copy that moves as many bytes.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithms.future_kl import context_parallel, kernel, reference, scan
from megatron_fipo.algorithms.future_kl.segments import segment_plan
from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.parallel.layout import PackLayout
from megatron_fipo.parallel.packs import gather_pack

HALF_LIFE = 32.0
CHUNK = 128
LENGTHS = {
    "32 × 2k": (2048,) * 32,
    "32 × 16k": (16_384,) * 32,
    "packed 64 × 20k": tuple(20_480 - 15 * index for index in range(64)),
}
ACROSS_RANKS = {"packed 64 × 20k": LENGTHS["packed 64 × 20k"], "1 × 131k": (131_072,)}


@dataclass(frozen=True)
class Case:
    """Log-ratios of sequences of these lengths, end to end and as padded rows."""

    lengths: tuple[int, ...]
    device: str

    @cached_property
    def packed(self) -> Tensor:
        """[T] float32, σ = 0.05."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(sum(self.lengths), generator=generator) * 0.05).to(self.device)

    @cached_property
    def rows(self) -> Tensor:
        """[B, L], zeros behind the end of every sequence."""
        return torch.nn.utils.rnn.pad_sequence(list(self.packed.split(self.lengths)), batch_first=True)

    @cached_property
    def cu_seqlens(self) -> list[int]:
        """Starts of the sequences, and the end of the last."""
        return PackLayout(self.lengths).cu_seqlens.tolist()


def by_scan(case: Case) -> Tensor:
    """[T]."""
    segment_plan.cache_clear()
    if len(set(case.lengths)) == 1:
        return scan.future_kl(case.rows, HALF_LIFE).reshape(-1)
    return scan.future_kl(case.packed, HALF_LIFE, case.cu_seqlens)


def by_official_form(case: Case) -> Tensor:
    """[B, L], in the dtype of the log-ratios throughout."""
    rows = case.rows
    length = rows.shape[1]
    positions = torch.arange(length, device=rows.device)
    decay = torch.tensor(2.0 ** (-1.0 / HALF_LIFE), dtype=rows.dtype, device=rows.device)
    sums = torch.zeros_like(rows)
    for start in range(0, length, CHUNK):
        columns = positions[start : start + CHUNK]
        distance = columns[None, :] - positions[:, None]
        block = torch.where(distance >= 0, decay ** distance.clamp(min=0), 0.0)
        sums += rows[:, start : start + CHUNK] @ block.T
    return sums


def by_serial_loop(case: Case) -> Tensor:
    """[B, L]."""
    columns = case.rows.T.contiguous()
    decay = 2.0 ** (-1.0 / HALF_LIFE)
    for step in range(len(columns) - 2, -1, -1):
        columns[step].add_(columns[step + 1], alpha=decay)
    return columns.T.contiguous()


FORMS: dict[str, Callable[[Case], Tensor]] = {
    "scan": by_scan,
    "official": by_official_form,
    "serial": by_serial_loop,
}


def main() -> None:
    """Measure what the options ask for, and print it."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        form, name = options.memory_of
        print(json.dumps(extra_memory_mib(FORMS[form], name, options.device)))
        return
    if options.ranks:
        results = across_ranks(options)
        if options.rank == 0:
            print(json.dumps(results))
        return
    device = [*device_table(), ""] if options.device == "cuda" else []
    report = "\n".join([describe(options), "", *device, *local_table(options), "", *rank_table(options)])
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every process")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of every form, after one that is not")
    parser.add_argument("--rank-counts", type=int, nargs="*", default=[1, 2, 4, 8], help="context-parallel sizes")
    parser.add_argument("--output", type=Path, help="also write the tables here")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args()


def describe(options: argparse.Namespace) -> str:
    """What was measured on what."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({os.cpu_count()} cores)"
    return (
        f"commit {commit.stdout.strip()}, {device}, {platform.machine()}, torch {torch.__version__}, "
        f"{options.threads} threads, {options.repeats} repeats: min / median / max"
    )


def local_table(options: argparse.Namespace) -> list[str]:
    """One row for every form and size."""
    lines = [
        "| sequences | form | time, ms | ns a token | times the scan's median | largest error | extra memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, lengths in LENGTHS.items():
        case = Case(lengths, options.device)
        case.rows, case.packed, case.cu_seqlens  # noqa: B018  (made before any clock runs)
        times = time_in_turns({form: partial(call, case) for form, call in FORMS.items()}, options)
        for form, seconds in times.items():
            median = statistics.median(seconds)
            lines.append(
                f"| {name} | {form} | {spread(seconds)} | {median / sum(lengths) * 1e9:.1f} "
                f"| {median / statistics.median(times['scan']):.3g} | {error_of(form, case):.1e} "
                f"| {run_self(options, '--memory-of', form, name):.0f} |"
            )
    return lines


def device_table() -> list[str]:
    """One row for every kernel and size: kernels' own time on the device, inputs cold, plans made before."""
    from serial_scan_triton import serial_scan

    lines = [
        "| sequences | form | time on the device, µs | bytes a token | share of a copy's bandwidth |",
        "|---|---|---|---|---|",
    ]
    config = FipoConfig.preset("official-32b", decay_half_life_tokens=HALF_LIFE)
    for name, lengths in LENGTHS.items():
        case = Case(lengths, "cuda")
        plan = segment_plan(lengths, case.packed.device)
        advantages = -torch.ones_like(case.packed)
        # More than any cache holds.
        inputs = [(each, each.exp(), advantages.clone()) for each in copies_of(case.packed)]
        sum_up = partial(kernel.segmented_reverse_sum, half_life=HALF_LIFE, plan=plan, dtype=torch.float32)
        forms: dict[str, tuple[int, list[Callable[[], Any]]]] = {
            "copy": (8, [partial(torch.clone, each) for each, _, _ in inputs]),
            "scan": (8, [partial(sum_up, each) for each, _, _ in inputs]),
            "fused": (20, [partial(kernel.fused_influence, *each, config, plan) for each in inputs]),
            "Triton loop": (8, [partial(serial_scan, case.rows, HALF_LIFE)]),
            "official": (8, [partial(by_official_form, case)]),
        }
        speeds: dict[str, float] = {}
        for form, (bytes_a_token, calls) in forms.items():
            seconds = seconds_on_device(calls)
            speeds[form] = bytes_a_token * sum(lengths) / seconds
            share = speeds[form] / speeds["copy"]
            lines.append(f"| {name} | {form} | {seconds * 1e6:.1f} | {bytes_a_token} | {share:.1%} |")
    return lines


def copies_of(values: Tensor) -> list[Tensor]:
    """As many copies as fill 512 MiB."""
    return [values.clone() for _ in range(1 + 2**29 // values.nbytes)]


def seconds_on_device(calls: Sequence[Callable[[], Any]]) -> float:
    """Mean time of a call's kernels, without what passes between them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6 / len(calls)


def time_in_turns(calls: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every repeat; each round calls every form once."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(options.repeats + 1):
        for name, call in calls.items():
            synchronize(options.device)
            started = time.perf_counter()
            call()
            synchronize(options.device)
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(seconds: list[float]) -> str:
    """Min / median / max in milliseconds."""
    return " / ".join(f"{value * 1e3:.3g}" for value in (min(seconds), statistics.median(seconds), max(seconds)))


def error_of(form: str, case: Case) -> float:
    """Largest difference from the float64 recurrence."""
    result = FORMS[form](case)
    if result.dim() == 2:
        result = torch.cat([row[:length] for row, length in zip(result, case.lengths, strict=True)])
    expected = reference.future_kl_by_recurrence(case.packed.cpu(), HALF_LIFE, case.cu_seqlens)
    return float((result.cpu().double() - expected).abs().max())


def run_self(options: argparse.Namespace, *words: str) -> Any:
    """What this program, in a process of its own, prints as JSON."""
    command = [sys.executable, __file__, "--device", options.device, "--threads", str(options.threads), *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{finished.stderr[-4000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def extra_memory_mib(form: Callable[[Case], Tensor], name: str, device: str) -> float:
    """Peak of one call above what was held before it, in a process that has made a small call."""
    form(Case((300, 200), device))
    case = Case(LENGTHS[name], device)
    case.rows, case.packed, case.cu_seqlens  # noqa: B018
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        form(case)
        return (torch.cuda.max_memory_allocated() - held) / 1024**2
    held = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Makes the peak start from here.
    form(case)
    return (resident_kib("VmHWM") - held) / 1024


def resident_kib(key: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def rank_table(options: argparse.Namespace) -> list[str]:
    """Across ranks: our scan, and a gather of the whole pack followed by the same local scan on every rank."""
    lines = [
        "| sequences | ranks | cross-rank scan, ms | gather, then scan, ms | ratio of medians "
        "| sent a rank, bytes: scan | gather | extra tensors a rank, bytes: scan | gather |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in options.rank_counts:
        if options.device == "cuda" and count > torch.cuda.device_count():
            continue
        with tempfile.TemporaryDirectory() as folder:
            words = ["--repeats", str(options.repeats), "--ranks", str(count), "--store", f"{folder}/store"]
            command = [sys.executable, __file__, "--device", options.device, "--threads", str(options.threads), *words]
            others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, count)]
            results = run_self(options, *words, "--rank", "0")
            for other in others:
                other.wait()
        for name, seconds in results.items():
            lines.append(rank_row(name, count, seconds))
    return lines


def rank_row(name: str, count: int, seconds: dict[str, list[float]]) -> str:
    """One line of the table; bytes are counted, not measured."""
    layout = PackLayout(ACROSS_RANKS[name], count)
    ratio = statistics.median(seconds["gather"]) / statistics.median(seconds["scan"])
    sent = [24 * len(layout.local_chunk_lengths), 4 * layout.num_local_tokens] if count > 1 else [0, 0]
    # The gathered summaries; the gathered pack, and its sums.
    held = [24 * layout.num_sequences * layout.chunks_per_sequence, 2 * 4 * layout.num_tokens] if count > 1 else [0, 0]
    return (
        f"| {name} | {count} | {spread(seconds['scan'])} | {spread(seconds['gather'])} | {ratio:.2f} "
        f"| {sent[0]:,} | {sent[1]:,} | {held[0]:,} | {held[1]:,} |"
    )


def across_ranks(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """On one rank: seconds of every repeat, each the slowest rank's."""
    backend = "nccl" if options.device == "cuda" else "gloo"
    if options.device == "cuda":
        torch.cuda.set_device(options.rank)
    dist.init_process_group(backend, init_method=f"file://{options.store}", rank=options.rank, world_size=options.ranks)
    results = {}
    for name, lengths in ACROSS_RANKS.items():
        layout = PackLayout(lengths, options.ranks, options.rank)
        case = Case(lengths, options.device)
        mine = layout.shard(case.packed)

        def cross_rank(mine: Tensor = mine, layout: PackLayout = layout) -> Tensor:
            return context_parallel.future_kl(mine, HALF_LIFE, layout, dist.group.WORLD)[0]

        def gather_first(mine: Tensor = mine, layout: PackLayout = layout, case: Case = case) -> Tensor:
            whole = gather_pack(mine, layout, dist.group.WORLD)
            return layout.shard(scan.future_kl(whole, HALF_LIFE, case.cu_seqlens))

        assert math.isclose(float((cross_rank() - gather_first()).abs().max()), 0.0, abs_tol=1e-5)
        seconds: dict[str, list[float]] = {"scan": [], "gather": []}
        for _ in range(options.repeats):
            for form, call in (("scan", cross_rank), ("gather", gather_first)):
                dist.barrier()
                synchronize(options.device)
                started = time.perf_counter()
                call()
                synchronize(options.device)
                slowest = torch.tensor(time.perf_counter() - started, device=options.device)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                seconds[form].append(float(slowest))
        results[name] = seconds
    dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
