"""What the whole FIPO loss costs beside the DAPO loss: scan, weights, loss, metrics with quantiles, and backward.

    python tools/benchmark_policy_loss.py [--rows 32] [--columns 16384] [--repeats 15] [--dtype float32]

All run in turns in one process, so that the machine's noise meets all; times are processor time, the table gives
medians, and the median, lowest and highest of the ratios of neighbouring runs.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor

from megatron_fipo.algorithms.losses import policy_loss_on_rows
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig

LOSSES: dict[str, AlgorithmConfig] = {
    "DAPO": DapoConfig(),
    "FIPO, official-32b": FipoConfig.preset("official-32b", aggregation="token_mean"),
    "FIPO, official-7b": FipoConfig.preset("official-7b", aggregation="token_mean"),
}


def make_batch(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows whose responses begin within the first eighth and end within the last half."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    positions = torch.arange(columns)
    begins = torch.randint(1, max(columns // 8, 2), (rows, 1), generator=generator)
    ends = torch.randint(columns // 2, columns, (rows, 1), generator=generator)
    change = 0.05 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return {
        "log_probs": (old + change).to(dtype),
        "old_log_probs": old.to(dtype),
        "advantages": torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype),
        "response_mask": (positions >= begins) & (positions < ends),
    }


def time_once(batch: dict[str, Tensor], config: AlgorithmConfig) -> tuple[float, float]:
    """Seconds of processor time of loss and backward, and of rendering the metrics."""
    log_probs = batch["log_probs"].clone().requires_grad_()
    begin = time.process_time()
    output = policy_loss_on_rows(**{**batch, "log_probs": log_probs}, config=config)
    output.loss.backward()
    middle = time.process_time()
    assert output.metrics
    return middle - begin, time.process_time() - middle


def main() -> None:
    """Time the losses in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--columns", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args()
    batch = make_batch(options.rows, options.columns, getattr(torch, options.dtype))
    for config in LOSSES.values():
        time_once(batch, config)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    for _ in range(options.repeats):
        for name, config in LOSSES.items():
            times[name].append(time_once(batch, config))
    print(
        f"{options.rows} × {options.columns}, {options.dtype}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, {platform.machine()}, {options.repeats} repeats\n\n"
        "| loss | loss and backward, ms | metrics as numbers, ms | together, ms | over DAPO (lowest to highest) |\n"
        "|---|---|---|---|---|"
    )
    for name, parts in times.items():
        loss, metrics = (1e3 * statistics.median(column) for column in zip(*parts, strict=True))
        totals = [sum(part) for part in parts]
        ratios = [mine / sum(dapo) for mine, dapo in zip(totals, times["DAPO"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {loss:.0f} | {metrics:.0f} | {1e3 * statistics.median(totals):.0f} | {spread} |")


if __name__ == "__main__":
    main()
