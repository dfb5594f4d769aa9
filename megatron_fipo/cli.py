"""The command line: `megatron-fipo COMMAND CONFIG.yaml [--section.field value ...]`."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.runtime.exit_codes import BAD_INPUT, DONE, FAILED, GO_ON, INTERRUPTED, TERMINATED
from megatron_fipo.runtime.watchdog.stop_signals import STOP_SIGNALS

if TYPE_CHECKING:
    from megatron_fipo.config.evaluate import EvaluateConfig
    from megatron_fipo.config.run import RunConfig
    from megatron_fipo.config.run_changes import Change
    from megatron_fipo.runtime.stop_request import StopRequest
    from megatron_fipo.runtime.watchdog.whereabouts import Whereabouts

USAGE = """\
megatron-fipo train|evaluate|check|serve CONFIG.yaml [--section.field value ...]
megatron-fipo inspect RUN [--step N] [--sample I]
megatron-fipo convert to-hf RUN|CHECKPOINT OUT | to-megatron HF OUT | verify RUN|CHECKPOINT HF

  train     Run the configuration. Start it with srun (slurm/train.sbatch) or torchrun on several ranks, or plainly on
            one. `--mode rollout_only` records rollouts, `--mode train_only` trains on recorded ones.
            `megatron-fipo train --replay RUN/dumps/step_N [--section.field value ...]` runs an update again that a run
            has kept, and compares: status 0 where it is the same, 1 where it differs (docs/numerical_faults.md).
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
# What a command ends with on a signal; one that is not named does nothing.
_AT_ONCE = {"SIGINT": INTERRUPTED, "SIGTERM": TERMINATED, "SIGUSR1": GO_ON}
_STOP_STATUSES = {
    "train": {"SIGINT": INTERRUPTED, "SIGTERM": GO_ON, "SIGUSR1": GO_ON},
    "serve": {"SIGINT": INTERRUPTED, "SIGTERM": TERMINATED},
}
# A large model's logits are computed by one rank, while the others wait.
_CONVERSION_TIMEOUT_S = 24 * 3600.0
_INSTALL = "pip install 'megatron-fipo[train]', or [launch] to check configurations; docs/install.md has the rest"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, see `runtime/exit_codes.py`."""
    from megatron_fipo.config.base import ConfigError

    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return DONE if words else BAD_INPUT
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
        return BAD_INPUT
    try:
        with _ending_at_once("train --replay" if words[1:2] == ["--replay"] else words[0]):
            return commands[words[0]](words[1:])
    except ConfigError as error:
        # Without a rank (the launcher's variables are wrong, perhaps on this one alone) every process speaks, and with
        # one the first of each node: a file may be missing on a single one.
        if (rank := int(os.environ.get("RANK", "0"))) == 0:
            print(f"megatron-fipo: {error}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK") == "0":
            print(f"megatron-fipo: rank {rank} ({socket.gethostname()}): {error}", file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name not in _IN_EXTRAS:
            raise
        print(f"megatron-fipo: {error}; {_INSTALL}", file=sys.stderr)
        return BAD_INPUT


def _train(words: Sequence[str]) -> int:
    from megatron_fipo.config.base import require
    from megatron_fipo.launch.slurm import rank_variables
    from megatron_fipo.runtime.errors import RunError

    os.environ.update(rank_variables(os.environ))
    if words and words[0] == "--replay":
        from megatron_fipo.trainer.replay_command import replay_dump

        return replay_dump(words[1:])
    require(
        not any(word.partition("=")[0] == "--replay" for word in words),
        field="command line",
        value=" ".join(words),
        rule="--replay must come first, in the place of a configuration",
        way_out="write `megatron-fipo train --replay RUN/dumps/step_N`; the configuration is the dump's",
    )
    if (config := _read_run_config("train", words)) is None:
        return DONE if _asks_for_help(words) else BAD_INPUT
    config.parallelism.check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    if "WORLD_SIZE" not in os.environ:
        # Several ranks see a directory that changes: rank 0 may have begun the run already.
        with suppress(RunError):
            # The run meets that, too, and has a status for it.
            _check_directory(config)
    return _train_on_ranks(config)


def _evaluate(words: Sequence[str]) -> int:
    from megatron_fipo.config.evaluate import EvaluateConfig
    from megatron_fipo.config.run import RunConfig
    from megatron_fipo.launch.slurm import rank_variables

    os.environ.update(rank_variables(os.environ))
    if (config := _read_config(EvaluateConfig, "evaluate", words, RunConfig)) is None:
        return DONE if _asks_for_help(words) else BAD_INPUT
    return _evaluate_on_ranks(config)


def _check(words: Sequence[str]) -> int:
    from megatron_fipo.rollout.servers.arguments import check_server_arguments
    from megatron_fipo.runtime.checkpoint_store import CheckpointStore
    from megatron_fipo.runtime.errors import BreakdownError, RunError
    from megatron_fipo.runtime.run_dir import RunDirectory

    if (config := _read_run_config("check", words)) is None:
        return DONE if _asks_for_help(words) else BAD_INPUT
    # As slurm/train.sbatch gives it; empty where Slurm does not tell.
    if ranks := os.environ.get("WORLD_SIZE"):
        config.parallelism.check_world_size(int(ranks))
    check_server_arguments(config.rollout.sglang.server_arguments)
    try:
        for change in _check_directory(config):
            print(f"not as in the run's configuration: {change}", file=sys.stderr)
        CheckpointStore(RunDirectory(config.output_dir).checkpoints).newest_valid(check_hashes=False)
    except RunError as error:
        print(f"megatron-fipo: {error}", file=sys.stderr)
        # What cannot be read now may be there when the run starts, which has a status for it.
        return DONE if isinstance(error, BreakdownError) else BAD_INPUT
    return DONE


def _check_directory(config: "RunConfig") -> "list[Change]":
    """See that a run may begin in its directory, or go on there; returns how it differs from its beginning."""
    from megatron_fipo.runtime.earlier_run import check_against_earlier
    from megatron_fipo.runtime.run_dir import RunDirectory
    from megatron_fipo.runtime.run_lock import check_unheld

    RunDirectory.check(config.output_dir, may_have_run=config.checkpoint.resume)
    check_unheld(config.output_dir)
    return check_against_earlier(config, RunDirectory(config.output_dir))


def _serve(words: Sequence[str]) -> int:
    import asyncio

    from megatron_fipo.config.base import require
    from megatron_fipo.rollout.servers.agent import serve
    from megatron_fipo.runtime.errors import RunError
    from megatron_fipo.runtime.logging import setup_logging
    from megatron_fipo.runtime.run_dir import RunDirectory

    if (config := _read_run_config("serve", words)) is None:
        return DONE if _asks_for_help(words) else BAD_INPUT
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
        number = asyncio.run(serve(RunDirectory(config.output_dir).servers, sglang.start_timeout_s))
    except RunError as error:
        print(f"megatron-fipo: the agent ended: {error}", file=sys.stderr)
        return FAILED
    if number:
        print(f"megatron-fipo: the agent ended on {signal.Signals(number).name}", file=sys.stderr)
    return number and 128 + number


def _inspect(words: Sequence[str]) -> int:
    from megatron_fipo.display.inspect import inspect

    return inspect(words)


def _convert(words: Sequence[str]) -> int:
    from megatron_fipo.launch.slurm import rank_variables
    from megatron_fipo.trainer.convert.words import parse

    os.environ.update(rank_variables(os.environ))
    # Heavy imports come after the words were read, so that their errors are instant.
    conversion = parse(words)

    from megatron_fipo.config.watchdog import WatchdogConfig
    from megatron_fipo.runtime.files.whole_folder import WholeFolder
    from megatron_fipo.trainer.convert.command import convert
    from megatron_fipo.trainer.ranks import RankWork, do_on_ranks

    writes = conversion.direction != "verify"
    left = f", and removes {WholeFolder(conversion.target, 'OUT').partial} first" if writes else ""
    return do_on_ranks(
        RankWork(
            do=lambda rank, where, stop: convert(conversion),
            name="the conversion",
            folder=None,
            # Nothing tells of its progress.
            watchdog=WatchdogConfig(stall_after_s=0),
            longest_wait_s=_CONVERSION_TIMEOUT_S,
            stop_statuses=_AT_ONCE,
            way_on=f"the same command begins anew{left}",
        )
    )


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


@contextmanager
def _ending_at_once(command: str) -> Iterator[None]:
    """End the process at once on a signal that nobody else listens to: imports take seconds, and lose nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    statuses = _STOP_STATUSES.get(command, _AT_ONCE)

    def end(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if name in statuses:
            if int(os.environ.get("RANK", "0")) == 0:
                os.write(2, f"megatron-fipo: {command} ended on {name}\n".encode())
            os._exit(statuses[name])

    before = {number: signal.signal(number, end) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_on_ranks(config: "RunConfig") -> int:
    # Heavy imports come after the configuration was read, so that its errors are instant.
    from megatron_fipo.display.watch import watch_run
    from megatron_fipo.trainer.build import build_run
    from megatron_fipo.trainer.loop import train
    from megatron_fipo.trainer.ranks import RankWork, do_on_ranks

    def work(rank: int, where: "Whereabouts", stop: "StopRequest") -> None:
        with watch_run(config.metrics.live_view, rank) as where.watcher:
            train(build_run(config, where, stop))

    return do_on_ranks(RankWork(do=work, name="the run", folder=config.output_dir, watchdog=config.watchdog))


def _evaluate_on_ranks(config: "EvaluateConfig") -> int:
    from megatron_fipo.config.watchdog import WatchdogConfig
    from megatron_fipo.trainer.evaluation.command import evaluate
    from megatron_fipo.trainer.ranks import RankWork, do_on_ranks

    return do_on_ranks(
        RankWork(
            do=lambda rank, where, stop: evaluate(config),
            name="the evaluation",
            folder=config.output_dir,
            # Nothing tells of its progress.
            watchdog=WatchdogConfig(stall_after_s=0),
            # What it has finished is on disk at any time.
            stop_statuses=_AT_ONCE,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
