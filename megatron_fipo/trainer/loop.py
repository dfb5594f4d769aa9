"""The training loop. Every rank runs it; rank 0 also drives the rollouts and writes the files."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import UpdateResult
from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.stream import EndOfPrompts
from megatron_fipo.parallel.agreement import on_main_rank, stop_comes_first
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.platform.device import compute_device
from megatron_fipo.rollout.batch import batch_path, load_recorded, save_batch
from megatron_fipo.rollout.controller import Rollout
from megatron_fipo.runtime.errors import CheckpointError, RunError
from megatron_fipo.runtime.stop_request import StopRequested
from megatron_fipo.trainer.dumps import Place
from megatron_fipo.trainer.evaluation.in_run import evaluate, evaluate_when_due
from megatron_fipo.trainer.export import export_when_done
from megatron_fipo.trainer.recovery import begin_checkpoint, complete_checkpoint, save_now
from megatron_fipo.trainer.reporting import finish_step, report_evaluation, report_step
from megatron_fipo.trainer.state import Run
from megatron_fipo.trainer.token_report import choose_recorded, write_token_records
from megatron_fipo.types import TrainBatch

logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """Run all steps, then close what the run holds open; collective over all ranks.

    Raises:
        RunError: There is nothing to learn from, a response could not be scored, a recording is damaged, a loss or
            gradient was not finite, or the export differs from the actor; raised on every rank.
        ConfigError: A recording does not suit the configuration; raised on every rank.
        StopRequested: The run was asked to end, and has saved what is new; raised on every rank.
    """
    with run.resources, _ending_on_request(run):
        run.progress.begin_run(run.config.output_dir, run.config.num_steps)
        report_beginning(run, sync_weights(run))
        for step in range(run.finished_steps + 1, run.config.num_steps + 1):
            run.progress.begin_step(step)
            on_main_rank(run.stop.raise_if_asked)
            try:
                rollout = collect_rollout(run, step)
            except EndOfPrompts as reason:
                end_early(run, step, reason)
                break
            batch = assemble_batch(run, step, rollout)
            micro_batches = distribute_batch(run, batch)
            compute_old_log_probs(run, micro_batches)
            compute_reference_log_probs(run, micro_batches)
            results = update_policy(run, step, micro_batches, batch)
            write_token_records(run, step, batch)
            finish_step(run, step, rollout, batch, results)
            begin_checkpoint(run)
            # What is left of the step can be done later.
            on_main_rank(run.stop.raise_if_asked)
            transfer = sync_weights(run)
            evaluation = evaluate_when_due(run, step)
            report_step(run, transfer | evaluation)
            complete_checkpoint(run)
        on_main_rank(run.stop.raise_if_asked)
        # Else the export has the weights.
        save_or_fail(run, is_needed=not run.config.checkpoint.export_at_end)
        with run.stop.nothing_to_save():
            export_when_done(run)


@contextmanager
def _ending_on_request(run: Run) -> Iterator[None]:
    """Where a stop is asked for, end in a good order; what comes after the last step is done again as a whole."""
    run.stop.has_nothing_to_save = False
    try:
        yield
    except StopRequested:
        end_on_request(run)
        raise
    except (ConfigError, RunError):
        # Raised on every rank. A checkpoint that has begun is of a step whose updates were good.
        with suppress(RunError):
            complete_checkpoint(run)
        with suppress(CheckpointError):
            run.checkpointer.finish()
        raise
    run.stop.has_nothing_to_save = True


def end_on_request(run: Run) -> None:
    """Bring the run to an end between two steps; a rollout or an evaluation that was broken off does not count.

    Raises:
        CheckpointError: It could not be saved, or is not to be.
    """
    is_saved = run.finished_steps in (0, run.checkpointer.saved_step)
    if not is_saved and not run.config.checkpoint.every_steps:
        raise CheckpointError(
            f"it was asked to end after step {run.finished_steps}, and checkpoint.every_steps = 0 saves nothing"
        )
    if run.unreported is not None:
        run.unreported.metrics |= run.timer.drain()
    save_or_fail(run, is_needed=True)


def save_or_fail(run: Run, is_needed: bool) -> None:
    """Write a checkpoint of the last step, where there is none yet.

    Args:
        run: This rank's view.
        is_needed: Whether the step would be lost without it.

    Raises:
        CheckpointError: It is needed, and could not be written.
    """
    if not save_now(run) and is_needed:
        raise CheckpointError(
            f"step {run.finished_steps} was the last one, and its checkpoint could not be written, see above; started "
            "again, the run goes on from the one before"
        )


def report_beginning(run: Run, transfer: Mapping[str, float]) -> None:
    """Evaluate before the first step, or after the one whose evaluation an earlier run had broken off.

    Args:
        run: This rank's view.
        transfer: Metrics of the weight sync; read on rank 0 alone.
    """
    if run.unreported is not None:
        report_step(run, {**transfer, **evaluate_when_due(run, run.finished_steps)})
    elif run.finished_steps == 0:
        report_evaluation(run, 0, {**transfer, **evaluate_when_due(run, 0)})


def end_early(run: Run, step: int, reason: EndOfPrompts) -> None:
    """Evaluate in place of a step for which there are no prompts; the export follows, as after the last step.

    Raises:
        EndOfPrompts: It is the first step, so there is nothing to keep.
    """
    if step == 1:
        raise reason
    if run.is_main:
        logger.warning("step %d: %s; the run ends here", step, reason)
    report_evaluation(run, step, evaluate(run, step))


def collect_rollout(run: Run, step: int) -> Rollout | None:
    """Prompts → requests → responses → rewards → filter: a full batch on rank 0, None elsewhere.

    In train-only runs there is nothing to collect.

    Raises:
        EndOfPrompts: They have been drawn `data.epochs` times.
        RunError: There is nothing to learn from, or a response could not be scored.
    """
    if run.rollout is None:
        return None
    run.require_directory()
    with run.timer.phase("rollout"), stop_comes_first(run.stop):
        return run.rollout.next_rollout(step, run.policy_version)


def assemble_batch(run: Run, step: int, rollout: Rollout | None) -> TrainBatch | None:
    """The step's packed batch with advantages, on rank 0: the rollout's, or a recording.

    Raises:
        RecordedBatchError: The recording is damaged.
        ConfigError: The recording does not suit the configuration.
        SafeguardError: Reward or response length has collapsed.
        RunError: The run directory is gone.
    """
    return on_main_rank(lambda: _assemble(run, step, rollout))


def _assemble(run: Run, step: int, rollout: Rollout | None) -> TrainBatch:
    if rollout is None:
        batch = load_recorded(run.recorded[step - 1], run.config, run.actor.bridge.vocab_size, step)
    else:
        batch = rollout.batch
    assert run.directory is not None, "rank 0 has it"
    run.directory.require_here()
    if run.config.mode == "rollout_only":
        save_batch(batch, batch_path(run.directory.rollouts, step), step)
    run.safeguards.watch_rollout(step, batch, {} if rollout is None else rollout.metrics)
    return batch


def distribute_batch(run: Run, batch: TrainBatch | None) -> list[list[MicroBatch]]:
    """Every rank's micro-batches, by mini-batch; none in rollout-only runs.

    Raises:
        RoutingFileError: The experts to replay are missing or unfit.
    """
    if run.actor.train_step is None:
        return []
    choose_recorded(run, batch)
    with run.timer.phase("distribute"):
        micro_batches = shard_micro_batches(
            batch, packing_rules(run.config.parallelism), run.context, compute_device(), run.actor.forward.routing
        )
    if run.config.mode == "train" and batch is not None and batch.routing_file is not None:
        # On this rank alone; one that stays is written over.
        with suppress(OSError):
            batch.routing_file.unlink()
    return micro_batches


def compute_old_log_probs(run: Run, micro_batches: Sequence[Sequence[MicroBatch]]) -> None:
    """Log-probabilities under the weights before the first update, on the packs that the updates use."""
    with run.timer.phase("old_log_probs"):
        for micro_batch, log_probs in _log_probs(run, micro_batches):
            micro_batch.old_log_probs = log_probs


def compute_reference_log_probs(run: Run, micro_batches: Sequence[Sequence[MicroBatch]]) -> None:
    """Log-probabilities under the initial weights, on the same packs, where the loss has a reference KL.

    The reference policy is another model than the one that the engine ran, so it routes tokens for itself.
    """
    if run.actor.reference is None:
        return
    with run.timer.phase("reference"), run.actor.reference.in_place():
        for micro_batch, log_probs in _log_probs(run, micro_batches, replay_routing=False):
            micro_batch.reference_log_probs = log_probs


def _log_probs(
    run: Run, micro_batches: Sequence[Sequence[MicroBatch]], replay_routing: bool = True
) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Every micro-batch with its log-probabilities, on the last pipeline stage; elsewhere nothing."""
    for number, mini_batch in enumerate(micro_batches):
        log_probs = run.actor.forward.log_probs(mini_batch, replay_routing=replay_routing)
        yield from zip(mini_batch, log_probs, strict=False)
        run.progress.advance(number + 1, len(micro_batches))


def update_policy(
    run: Run, step: int, micro_batches: Sequence[Sequence[MicroBatch]], batch: TrainBatch | None
) -> list[UpdateResult]:
    """One optimizer step per mini-batch, as far as the safeguards let it.

    Raises:
        NonFiniteError: A loss, gradient or weight was not finite.
        SafeguardError: Another safeguard ends the run. The weights are those before it.
    """
    results: list[UpdateResult] = []
    if run.actor.train_step is None:
        return results
    if not any(gather_json(_has_signal(micro_batches))):
        if run.is_main:
            logger.warning("step %d: every group has equal rewards; all its updates were skipped", step)
        return results
    with run.timer.phase("update"):
        for number, mini_batch in enumerate(micro_batches):
            place = Place(
                step=step,
                update=number + 1,
                num_updates=len(micro_batches),
                policy_version=run.policy_version,
                is_null=not any(result.applied for result in results),
            )
            results.append(run.safeguards.update(mini_batch, place, batch))
            run.progress.advance(number + 1, len(micro_batches))
    run.policy_version += 1
    return results


def _has_signal(micro_batches: Sequence[Sequence[MicroBatch]]) -> bool:
    return any(bool(each.advantages.any()) for mini_batch in micro_batches for each in mini_batch)


def sync_weights(run: Run) -> dict[str, float]:
    """Bring the engine to the actor's current weights, where it has others; metrics of the transfer on rank 0.

    Raises:
        RunError: Nothing that generates has them.
    """
    if run.rollout is None or run.rollout.policy_version == run.policy_version:
        return {}
    with run.timer.phase("weight_sync"), stop_comes_first(run.stop):
        return run.rollout.sync(run.policy_version)
