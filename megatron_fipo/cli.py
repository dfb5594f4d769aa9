"""The command line: `megatron-fipo COMMAND CONFIG.yaml [--section.field value ...]`."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_fipo.config.run import RunConfig

USAGE = """\
megatron-fipo train CONFIG.yaml [--section.field value ...]

  train     Run the configuration. Start it with srun (slurm/train.sbatch) or
            torchrun on several ranks, or plainly on one.
            `--mode rollout_only` records rollouts, `--mode train_only` trains on recorded ones.

`megatron-fipo train --help` lists every field.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 the run failed, 2 the input was bad."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] != "train":
        print(f"megatron-fipo: no command {words[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    return _train(words[1:])


def _train(words: Sequence[str]) -> int:
    from megatron_fipo.config.base import ConfigError
    from megatron_fipo.launch.slurm import rank_variables

    try:
        os.environ.update(rank_variables(os.environ))
        return _run(words)
    except ConfigError as error:
        # Without a rank (the launcher's variables are wrong, perhaps on this one alone) every process speaks.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron-fipo: {error}", file=sys.stderr)
        return 2


def _run(words: Sequence[str]) -> int:
    from megatron_fipo.config.help import help_text
    from megatron_fipo.config.load import load_config
    from megatron_fipo.config.run import RunConfig

    if words and words[0] in ("-h", "--help"):
        print(help_text(RunConfig, "megatron-fipo train CONFIG.yaml [--section.field value ...]"), end="")
        return 0
    if not words or words[0].startswith("-"):
        print(f"megatron-fipo: train needs a configuration file first\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    config = load_config(RunConfig, Path(words[0]), words[1:])
    config.parallelism.check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    return _train_on_ranks(config)


def _train_on_ranks(config: "RunConfig") -> int:
    # Heavy imports come after the configuration was read, so that its errors are instant.
    from megatron_fipo.display.watch import watch_run
    from megatron_fipo.runtime.errors import RunError
    from megatron_fipo.runtime.logging import setup_logging
    from megatron_fipo.trainer.build import build_run
    from megatron_fipo.trainer.loop import train

    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    try:
        with _process_group(), watch_run(config.metrics.live_view, rank) as progress:
            train(build_run(config, progress))
    except RunError as error:
        if rank == 0:
            print(f"megatron-fipo: the run stopped: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _process_group() -> Iterator[None]:
    """Join the ranks that torchrun or srun started, or be the only rank."""
    import torch
    import torch.distributed as dist

    from megatron_fipo.config.base import ConfigError
    from megatron_fipo.platform.device import collective_backend, compute_device, uses_cuda
    from megatron_fipo.runtime.errors import RunError

    if uses_cuda():
        _check_visible_devices(torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(compute_device())
    with tempfile.TemporaryDirectory(prefix="megatron_fipo_") as folder:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(collective_backend())
        else:
            method = f"file://{folder}/store"
            dist.init_process_group(collective_backend(), init_method=method, rank=0, world_size=1)
        try:
            yield
        except (ConfigError, RunError):
            # Raised on every rank. After any other error a rank stands alone, and leaving could wait for ever.
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def _check_visible_devices(num_devices: int, local_rank: int) -> None:
    """Refuse a rank whose device is hidden from it."""
    from megatron_fipo.config.base import require

    require(
        local_rank < num_devices,
        field="LOCAL_RANK",
        value=local_rank,
        rule=f"each rank of a node uses the device of its number, and this one sees only {num_devices}",
        way_out=(
            "start as many ranks on a node as it has devices, and let each see them all (Slurm: --gpus-per-node, not "
            "--gpus-per-task or --gpu-bind)"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
