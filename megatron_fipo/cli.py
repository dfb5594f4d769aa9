"""The command line: `megatron-fipo COMMAND CONFIG.yaml [--section.field value ...]`."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_fipo.config.evaluate import EvaluateConfig
    from megatron_fipo.config.run import RunConfig

USAGE = """\
megatron-fipo train|evaluate|check|serve CONFIG.yaml [--section.field value ...]
megatron-fipo inspect RUN [--step N] [--sample I]
megatron-fipo convert to-hf RUN|CHECKPOINT OUT | to-megatron HF OUT | verify RUN|CHECKPOINT HF

  train     Run the configuration. Start it with srun (slurm/train.sbatch) or torchrun on several ranks, or plainly on
            one. `--mode rollout_only` records rollouts, `--mode train_only` trains on recorded ones.
  evaluate  Try prompts with answers on a model folder, such as a run's export: Avg@k, Cons@k and Pass@k with their
            intervals. CONFIG.yaml may be the run's own. Started again, it goes on where it stopped.
  inspect   Show the steps of a run directory, its samples, and their tokens with log-ratio, Future-KL and influence
            weight; `megatron-fipo inspect --help` says how. Reads files alone.
  convert   Make a Hugging Face folder of a checkpoint or a checkpoint of a folder, tensor by tensor and proven by bytes
            and logits; `megatron-fipo convert --help` says how. On one process, or under torchrun or srun.
  check     Read the configuration and say what is wrong with it, also on WORLD_SIZE ranks where that is set.
  serve     On a rollout node, run the SGLang servers of a run with rollout.sglang.num_agents, and end with it
            (slurm/train_sglang.sbatch). Give it what `train` is given.

`megatron-fipo train --help` lists every field, and so does `megatron-fipo evaluate --help`.
"""

# What a command meets first where the package was installed for its losses alone.
_IN_EXTRAS = frozenset({"aiohttp", "numpy", "psutil", "pydantic", "rich", "tyro", "yaml"})
# More than what one rank may wait for servers while the others are in a collective.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# A large model's logits are computed by one rank, while the others wait.
_CONVERSION_TIMEOUT = timedelta(hours=24)
_INSTALL = "pip install 'megatron-fipo[train]', or [launch] to check configurations; docs/install.md has the rest"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 the run failed, 2 the input was bad."""
    from megatron_fipo.config.base import ConfigError

    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "inspect": _inspect,
        "convert": _convert,
        "check": _check,
        "serve": _serve,
    }
    if words[0] not in commands:
        print(f"megatron-fipo: no command {words[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        return commands[words[0]](words[1:])
    except ConfigError as error:
        # Without a rank (the launcher's variables are wrong, perhaps on this one alone) every process speaks.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron-fipo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _IN_EXTRAS:
            raise
        print(f"megatron-fipo: {error}; {_INSTALL}", file=sys.stderr)
        return 2


def _train(words: Sequence[str]) -> int:
    from megatron_fipo.launch.slurm import rank_variables

    os.environ.update(rank_variables(os.environ))
    if (config := _read_run_config("train", words)) is None:
        return 0 if _asks_for_help(words) else 2
    config.parallelism.check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    return _train_on_ranks(config)


def _evaluate(words: Sequence[str]) -> int:
    from megatron_fipo.config.evaluate import EvaluateConfig
    from megatron_fipo.config.run import RunConfig
    from megatron_fipo.launch.slurm import rank_variables

    os.environ.update(rank_variables(os.environ))
    if (config := _read_config(EvaluateConfig, "evaluate", words, RunConfig)) is None:
        return 0 if _asks_for_help(words) else 2
    return _evaluate_on_ranks(config)


def _check(words: Sequence[str]) -> int:
    from megatron_fipo.rollout.servers.arguments import check_server_arguments
    from megatron_fipo.runtime.earlier_run import check_against_earlier
    from megatron_fipo.runtime.run_dir import RunDirectory

    if (config := _read_run_config("check", words)) is None:
        return 0 if _asks_for_help(words) else 2
    # As slurm/train.sbatch gives it; empty where Slurm does not tell.
    if ranks := os.environ.get("WORLD_SIZE"):
        config.parallelism.check_world_size(int(ranks))
    directory = RunDirectory(config.output_dir)
    directory.check(config.output_dir, may_have_run=config.checkpoint.resume)
    check_against_earlier(config, directory)
    check_server_arguments(config.rollout.sglang.server_arguments)
    return 0


def _serve(words: Sequence[str]) -> int:
    import asyncio

    from megatron_fipo.config.base import require
    from megatron_fipo.rollout.servers.agent import serve
    from megatron_fipo.runtime.errors import RunError
    from megatron_fipo.runtime.logging import setup_logging
    from megatron_fipo.runtime.run_dir import RunDirectory

    if (config := _read_run_config("serve", words)) is None:
        return 0 if _asks_for_help(words) else 2
    sglang = config.rollout.sglang
    require(
        sglang.num_agents > 0,
        field="rollout.sglang.num_agents",
        value=sglang.num_agents,
        rule="the run waits for no agents: it has its servers elsewhere, or beside its controller",
        way_out="set it to the number of rollout nodes, and give `train` the same",
    )
    setup_logging("agent")
    try:
        asyncio.run(serve(RunDirectory(config.output_dir).servers, sglang.start_timeout_s))
    except RunError as error:
        print(f"megatron-fipo: the agent ended: {error}", file=sys.stderr)
        return 1
    return 0


def _inspect(words: Sequence[str]) -> int:
    from megatron_fipo.display.inspect import inspect

    return inspect(words)


def _convert(words: Sequence[str]) -> int:
    from megatron_fipo.launch.slurm import rank_variables
    from megatron_fipo.trainer.convert.words import parse

    os.environ.update(rank_variables(os.environ))
    conversion = parse(words)

    def work(_: int) -> None:
        from megatron_fipo.trainer.convert.command import convert

        convert(conversion)

    return _on_ranks(work, "the conversion failed", _CONVERSION_TIMEOUT)


def _asks_for_help(words: Sequence[str]) -> bool:
    return bool(words) and words[0] in ("-h", "--help")


def _read_run_config(command: str, words: Sequence[str]) -> "RunConfig | None":
    from megatron_fipo.config.run import RunConfig

    return _read_config(RunConfig, command, words)


def _read_config[T](cls: type[T], command: str, words: Sequence[str], wider: type | None = None) -> T | None:
    """Read the configuration that a command names; none where it asks for help or names none, which is told."""
    from megatron_fipo.config.help import help_text
    from megatron_fipo.config.load import load_config

    if _asks_for_help(words):
        print(help_text(cls, f"megatron-fipo {command} CONFIG.yaml [--section.field value ...]"), end="")
        return None
    if not words or words[0].startswith("-"):
        print(f"megatron-fipo: {command} needs a configuration file first\n\n{USAGE}", end="", file=sys.stderr)
        return None
    return load_config(cls, Path(words[0]), words[1:], wider)


def _train_on_ranks(config: "RunConfig") -> int:
    # Heavy imports come after the configuration was read, so that its errors are instant.
    from megatron_fipo.display.watch import watch_run
    from megatron_fipo.trainer.build import build_run
    from megatron_fipo.trainer.loop import train

    def work(rank: int) -> None:
        with watch_run(config.metrics.live_view, rank) as progress:
            train(build_run(config, progress))

    return _on_ranks(work, "the run stopped")


def _evaluate_on_ranks(config: "EvaluateConfig") -> int:
    from megatron_fipo.trainer.evaluation.command import evaluate

    return _on_ranks(lambda rank: evaluate(config), "the evaluation stopped")


def _on_ranks(work: Callable[[int], None], end: str, timeout: timedelta = _COLLECTIVE_TIMEOUT) -> int:
    """Do the work of this rank, which it is told, in its process group; returns the exit status."""
    from megatron_fipo.runtime.errors import RunError
    from megatron_fipo.runtime.logging import setup_logging

    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    try:
        with _process_group(timeout):
            work(rank)
    except RunError as error:
        if rank == 0:
            print(f"megatron-fipo: {end}: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _process_group(timeout: timedelta) -> Iterator[None]:
    """Join the ranks that torchrun or srun started, or be the only rank."""
    import torch
    import torch.distributed as dist

    from megatron_fipo.config.base import ConfigError
    from megatron_fipo.platform.device import collective_backend, compute_device, uses_cuda
    from megatron_fipo.runtime.errors import RunError

    if uses_cuda():
        _check_visible_devices(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.cuda.set_device(compute_device())
    with tempfile.TemporaryDirectory(prefix="megatron_fipo_") as folder:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(collective_backend(), timeout=timeout)
        else:
            method = f"file://{folder}/store"
            dist.init_process_group(collective_backend(), init_method=method, rank=0, world_size=1)
        try:
            yield
        except (ConfigError, RunError):
            # Raised on every rank. After any other error a rank stands alone, and leaving could wait for ever.
            _meet_before_leaving()
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def _check_visible_devices(num_devices: int, local_world_size: int) -> None:
    """Refuse ranks whose devices are hidden from them."""
    from megatron_fipo.config.base import require

    require(
        local_world_size <= num_devices,
        field="LOCAL_WORLD_SIZE",
        value=local_world_size,
        rule=f"each rank of a node uses the device of its number, and a rank sees only {num_devices}",
        way_out=(
            "start as many ranks on a node as it has devices, and let each see them all (Slurm: --gpus-per-node, not "
            "--gpus-per-task or --gpu-bind)"
        ),
    )


def _meet_before_leaving() -> None:
    """Wait for the other ranks, which met the same error, and let no launcher end this one before it has told it.

    Launchers end all ranks once one has failed; that one need not be rank 0, which tells the error.
    """
    import signal
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A rank that is gone cannot come.
    with suppress(RuntimeError):
        meeting = dist.all_reduce(torch.zeros(1), async_op=True)
        assert meeting is not None
        meeting.wait(timedelta(seconds=30))


if __name__ == "__main__":
    sys.exit(main())
