"""Runs an update again from its dump and compares: forward and backward pass, without the step and without a file."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fipo.actor.checkpoint import ActorCheckpoint, layout_of
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep, UpdateResult
from megatron_fipo.actor.update_arrays import (
    OUTPUTS,
    MissingTokens,
    find_columns,
    packs,
    places_of,
    restore_inputs,
    update_arrays,
)
from megatron_fipo.config.base import ConfigError, require
from megatron_fipo.config.load import CONFIG_FILE, load_config, plain_values
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.run_changes import Change, changes_between
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.parallel.collectives import Arrays, gather_json
from megatron_fipo.parallel.context import build_parallel_context, destroy_parallel_context
from megatron_fipo.platform.device import compute_device
from megatron_fipo.runtime.errors import BreakdownError, CheckpointError
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.trainer.build import build_actor
from megatron_fipo.trainer.dumps import ACTOR_FOLDER, Dump, machine, read_dump
from megatron_fipo.types import TrainBatch

# Largest difference of losses (in mean |A|) and gradient norms (relative) in another process grid.
_TOLERANCES = {"float32": 1e-6, "bfloat16": 2e-2}
_STRANGEST = 10
_DECISIONS = ("kept", "dual_clipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """One micro-batch, run again.

    Attributes:
        rank: Its rank.
        number: Which of the rank's micro-batches, from 0.
        sequences: Its sequences, as the rollout batch numbers them.
        tokens: Response tokens of the rank's part.
        numerator: Its share of the loss sum.
        log_ratio: Largest |log-ratio|, not clamped; NaN where there is no token.
        non_finite: Tokens with a number that is not finite.
        dropped: Sequences that the sequence drop took out.
        dual_clipped: Tokens beyond the dual-clip bound.
        decided_otherwise: Tokens about which a decision differs from the dump's.
        differing: Tokens of which any number differs from the dump's, by a bit.
        difference: Largest difference of a log-probability from the dump's.
    """

    rank: int
    number: int
    sequences: list[int]
    tokens: int
    numerator: float
    log_ratio: float
    non_finite: int
    dropped: int
    dual_clipped: int
    decided_otherwise: int
    differing: int
    difference: float


@dataclass(frozen=True, slots=True)
class Number:
    """A number of the update, as it was and as it is.

    Attributes:
        name: Its name.
        before: The dump's; None where it has none.
        now: This run's; None where it has none.
        is_same: Whether they agree, as far as can be asked for.
    """

    name: str
    before: float | None
    now: float | None
    is_same: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What came of an update that was run again.

    Attributes:
        dump: The dump.
        changes: How the configuration differs from the dump's.
        machine: What it was run on.
        is_same_cut: Whether process grid and packs are those of the dump, so that every bit is compared.
        numbers: The update's numbers.
        packs: Its micro-batches; on all ranks.
        tokens: Its strangest tokens: "sequence", "position" and their numbers; on all ranks.
        bad_gradients: Micro-batches (numbers, on any rank) whose gradient alone is not finite.
        batch: The rollout batch, on rank 0.
    """

    dump: Dump
    changes: Sequence[Change]
    machine: Mapping[str, Any]
    is_same_cut: bool
    numbers: Sequence[Number]
    packs: Sequence[PackReport]
    tokens: Sequence[Mapping[str, Any]]
    bad_gradients: Sequence[int]
    batch: TrainBatch | None

    @property
    def is_same(self) -> bool:
        """Whether the update is the dump's, bit by bit, or in another grid within its tolerance."""
        differing = [each.differing if self.is_same_cut else each.decided_otherwise for each in self.packs]
        return all(each.is_same for each in self.numbers) and not any(differing)


@contextmanager
def refused_as_input(path: Path) -> Iterator[None]:
    """What makes a dump unfit becomes a `ConfigError`."""
    try:
        yield
    except (BreakdownError, CheckpointError) as error:
        # The error has the place already, and the field's value is it.
        rule = str(error).removeprefix(f"{path}: ").replace(f"{path}/", "")
        raise ConfigError("--replay", path, rule, "give a whole dump, RUN/dumps/step_N") from error


def open_dump(path: Path, overrides: Sequence[str]) -> tuple[Dump, RunConfig]:
    """Read what a dump says of itself, and its configuration with other values in it.

    Raises:
        ConfigError: The dump or an override cannot be used.
    """
    with refused_as_input(path):
        dump = read_dump(path)
    way_out = {
        "before": "",
        "after": "its step had damaged the weights before that was seen; go on from a checkpoint before it",
        "none": "set safeguards.dump_weights to true, and wait for another fault",
    }
    require(
        dump.weights == "before",
        field="--replay",
        value=path,
        rule="must hold the weights from before the update, and does not",
        way_out=way_out.get(dump.weights, "give another dump"),
    )
    require(
        (path / ACTOR_FOLDER).is_dir(),
        field="--replay",
        value=path,
        rule=f"has no folder {ACTOR_FOLDER}, which its weights were in",
        way_out="give a whole dump, RUN/dumps/step_N",
    )
    config = load_config(RunConfig, path / CONFIG_FILE, overrides)
    require(
        config.mode != "rollout_only",
        field="mode",
        value=config.mode,
        rule="must be one that trains",
        way_out="leave it out",
    )
    return dump, config


def replay(dump: Dump, config: RunConfig) -> Replay:
    """Run the update again; collective over all ranks, after the process group has started.

    Raises:
        ConfigError: The dump is damaged, or the configuration cannot be used; raised on every rank.
    """
    try:
        with refused_as_input(dump.path):
            return _replay(dump, config)
    finally:
        destroy_parallel_context()


def _replay(dump: Dump, config: RunConfig) -> Replay:
    context = build_parallel_context(config.parallelism, derive_seed(config.seed, "model"))
    on_main_rank(dump.check_bytes)
    bridge = on_every_rank(lambda: HfBridge(config.model.path, config.model.context_length, config.model.rope_base))
    actor = build_actor(config, bridge, context)
    train_step = actor.train_step
    assert train_step is not None, "the mode is one that trains"
    batch = on_main_rank(dump.batch)
    mini_batches = shard_micro_batches(batch, packing_rules(config.parallelism), context, compute_device())
    mini_batch = mini_batches[dump.place.update - 1]
    own = on_every_rank(lambda: _own_arrays(dump, context.rank))
    on_every_rank(lambda: _restore(dump, own, mini_batch, train_step))
    # Last, because it sets the random states.
    ActorCheckpoint(actor.chunks, None, context).load(dump.path / ACTOR_FOLDER)
    result = _run(train_step, mini_batch, dump.place.policy_version)
    is_same_cut = _is_same_cut(dump, own, train_step)
    pack_reports, tokens = on_every_rank(lambda: _compare(dump, own, train_step))
    scale = max(float(np.abs(batch.advantages).mean()) if batch is not None else 0.0, 1e-9)
    tolerance = 0.0 if is_same_cut else _TOLERANCES[config.model.dtype]
    numbers = [Number(*each) for each in gather_json(_numbers(dump.result, result, tolerance, scale))[0]]
    return Replay(
        dump=dump,
        changes=changes_between(plain_values(load_config(RunConfig, dump.path / CONFIG_FILE)), plain_values(config)),
        machine=machine(),
        is_same_cut=is_same_cut,
        numbers=numbers,
        packs=[PackReport(**each) for part in gather_json(pack_reports) for each in part],
        tokens=_strangest([each for part in gather_json(tokens) for each in part]),
        bad_gradients=_bad_gradients(train_step, mini_batch, dump.place.policy_version, result),
        batch=batch,
    )


def _run(train_step: TrainStep, mini_batch: Sequence[MicroBatch], policy_version: int) -> UpdateResult:
    return train_step.update(mini_batch, policy_version, lambda _: "it is run again, and not for its step")


def _own_arrays(dump: Dump, rank: int) -> Arrays:
    return dump.rank_arrays(rank) if rank < dump.world_size else {}


def _files(dump: Dump, own: Arrays, rank: int) -> Iterator[Arrays]:
    """Arrays of all ranks, the own ones first, others where they are asked for."""
    yield own
    for other in range(dump.world_size):
        if other != rank:
            yield dump.rank_arrays(other)


def _restore(dump: Dump, own: Arrays, mini_batch: Sequence[MicroBatch], train_step: TrainStep) -> None:
    context, routing = train_step.context, train_step.forward.routing
    try:
        for micro_batch in mini_batch:
            files = partial(_files, dump, own, context.rank)
            restore_inputs(micro_batch, files, routing, context.is_pipeline_last_stage)
    except (MissingTokens, ValueError, IndexError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{dump.path}: its ranks' files do not hold the update ({error})") from error


def _is_same_cut(dump: Dump, own: Arrays, train_step: TrainStep) -> bool:
    """Whether every rank has the micro-batches that it had."""
    assert train_step.evidence is not None, "an update has been computed"
    same = dump.checkpoint.manifest.layout == layout_of(train_step.context)
    if same:
        same = json.loads(own["packs"].tobytes()) == packs(train_step.evidence)
    return all(gather_json(same))


def _compare(dump: Dump, own: Arrays, train_step: TrainStep) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """This rank's micro-batches and strangest tokens, on one of the ranks that have the same ones."""
    context, evidence = train_step.context, train_step.evidence
    assert evidence is not None, "an update has been computed"
    if not context.is_pipeline_last_stage or context.tp_rank:
        return [], []
    mine = update_arrays(evidence, None)
    try:
        theirs = find_columns(mine["tokens"], _files(dump, own, context.rank), OUTPUTS)
    except MissingTokens as error:
        raise CheckpointError(f"{dump.path}: {error}") from error
    log_ratio = mine["log_probs"] - mine["old_log_probs"]
    columns = [values for name, values in mine.items() if values.dtype.kind == "f" and len(values) == len(log_ratio)]
    bad = ~np.all([np.isfinite(values) for values in columns], axis=0)
    differing = np.any([_differ(mine[name], theirs[name]) for name in theirs], axis=0)
    otherwise = np.any([mine[name] != theirs[name] for name in _DECISIONS], axis=0)
    sizes = [len(each.response_positions) for each in evidence.micro_batches]
    ends = np.cumsum(sizes)
    reports = []
    for number, (end, size, each) in enumerate(zip(ends, sizes, evidence.micro_batches, strict=True)):
        rows = slice(end - size, end)
        reports.append(
            PackReport(
                rank=context.rank,
                number=number,
                sequences=list(each.sequences),
                tokens=size,
                numerator=float(mine["numerators"][number]),
                log_ratio=_largest(log_ratio[rows]),
                non_finite=int(bad[rows].sum()),
                dropped=len(set(mine["dropped"].tolist()) & set(each.sequences)),
                dual_clipped=int(mine["dual_clipped"][rows].sum()),
                decided_otherwise=int(otherwise[rows].sum()),
                differing=int(differing[rows].sum()),
                difference=_largest(mine["log_probs"][rows] - theirs["log_probs"][rows]),
            )
        )
    return [asdict(each) for each in reports], _tokens(mine, log_ratio, bad)


def _differ(mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where two columns differ; a NaN is like another."""
    both_nan = (mine != mine) & (theirs != theirs)
    differ: npt.NDArray[np.bool_] = (mine != theirs) & ~both_nan
    return differ


def _largest(values: npt.NDArray[Any]) -> float:
    return float(np.abs(values).max()) if len(values) else math.nan


def _tokens(mine: Arrays, log_ratio: npt.NDArray[Any], bad: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """The strangest tokens: what is not finite first, then by the size of their log-ratio."""
    sizes = np.where(bad | ~np.isfinite(log_ratio), np.inf, np.abs(log_ratio))
    chosen = np.argsort(-sizes, kind="stable")[:_STRANGEST]
    sequences, positions = places_of(mine["tokens"][chosen])
    shown = {"log_ratio": log_ratio, "future_kl": mine["future_kl"], "influence_weights": mine["influence_weights"]}
    shown |= {name: mine[name] for name in ("old_log_probs", "advantages", *_DECISIONS)}
    return [
        {"sequence": int(sequence), "position": int(position), "size": float(sizes[row])}
        | {name: values[row].item() for name, values in shown.items()}
        for sequence, position, row in zip(sequences, positions, chosen, strict=True)
    ]


def _strangest(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(tokens, key=lambda each: (-each["size"], each["sequence"], each["position"]))[:_STRANGEST]


def _numbers(before: UpdateResult, now: UpdateResult, tolerance: float, scale: float) -> list[list[Any]]:
    """Fields of `Number`; metrics are compared where every bit is."""
    numbers = [
        ["loss", before.loss, now.loss, _agree(before.loss, now.loss, tolerance * scale)],
        [
            "gradient norm",
            before.grad_norm,
            now.grad_norm,
            _agree(before.grad_norm, now.grad_norm, tolerance * abs(before.grad_norm)),
        ],
        ["kept tokens", before.kept_tokens, now.kept_tokens, before.kept_tokens == now.kept_tokens],
        ["denominator", before.denominator, now.denominator, _agree(before.denominator, now.denominator, tolerance)],
    ]
    for name in sorted(before.metrics.keys() | now.metrics.keys()):
        mine, other = before.metrics.get(name), now.metrics.get(name)
        is_same = mine is not None and other is not None and _agree(mine, other, 0.0)
        numbers.append([name, mine, other, is_same or (tolerance > 0 and mine is not None and other is not None)])
    return numbers


def _agree(before: float, now: float, tolerance: float) -> bool:
    return before == now or abs(before - now) <= tolerance or (math.isnan(before) and math.isnan(now))


def _bad_gradients(
    train_step: TrainStep, mini_batch: Sequence[MicroBatch], policy_version: int, result: UpdateResult
) -> list[int]:
    """Micro-batches whose gradient alone is not finite, where that of all is not though their loss is.

    Interleaved stages cannot run one micro-batch alone.
    """
    is_sought = math.isfinite(result.loss) and not math.isfinite(result.grad_norm) and train_step.context.vpp_size == 1
    if not is_sought:
        return []
    each_alone = [_run(train_step, [each], policy_version) for each in mini_batch]
    return [number for number, alone in enumerate(each_alone) if not alone.is_finite]
