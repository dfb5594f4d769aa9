"""The rollout controller: from prompts to full batches of scored groups.

It owns the prompt stream, the requests in flight, rewards, dynamic sampling and the staleness bound, and speaks to any
engine through `RolloutEngine`. An engine that decodes in waves is asked for one round after the other (waves.py), a
`ServedEngine` is kept busy (served.py).
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.weight_sync import PauseMode
from megatron_fipo.metrics.rollout_metrics import group_metrics
from megatron_fipo.rollout.batch import batch_path, build_train_batch, routing_path, with_routing
from megatron_fipo.rollout.batch_recipe import BatchRecipe, CollectedGroups
from megatron_fipo.rollout.controller_state import ControllerState, read_controller_state, write_controller_state
from megatron_fipo.rollout.dispatch import Dispatcher
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParameters, ServedEngine
from megatron_fipo.rollout.journal import JournalEntry, forget_journal, journal_path, write_journal
from megatron_fipo.rollout.ledger import Ledger
from megatron_fipo.rollout.replay import JournalReplay
from megatron_fipo.rollout.sample_records import sample_records
from megatron_fipo.rollout.samples import Decode, SampleMaker
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.rollout.served import ServedSource
from megatron_fipo.rollout.staleness import staleness_metrics
from megatron_fipo.rollout.waves import WaveSource
from megatron_fipo.runtime.errors import CheckpointError
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.types import Prompt, RolloutGroup, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A training batch and what is told of it; arrays and plain JSON values, so that it can go to another process.

    Attributes:
        batch: The batch.
        metrics: Counters of the rollout, and what needs the scored samples.
        records: Some samples, as lines of samples.jsonl.
    """

    batch: TrainBatch
    metrics: dict[str, float]
    records: list[dict[str, Any]]


@dataclass(slots=True, kw_only=True)
class RolloutController:
    """Turns prompts into batches.

    With a served engine it belongs to one event loop, which goes on running while nothing is asked of it: with
    `rollout.policy_lag` it then generates for the next batches.

    Attributes:
        engine: Generates.
        scoring: Rewards.
        decode: Token ids to text.
        config: Batch size, sampling and bounds.
        sampling: How tokens are drawn.
        seed: Seed of all draws.
        recipe: Of training batches; None where `generate_groups` alone is used.
        progress: Told of every response.
    """

    engine: RolloutEngine | ServedEngine
    scoring: Scoring
    decode: Decode
    config: RolloutConfig
    sampling: SamplingParameters
    seed: int
    recipe: BatchRecipe | None = None
    progress: Progress = NO_PROGRESS
    _waves: WaveSource | None = field(init=False, default=None)
    _served: ServedSource | None = field(init=False, default=None)
    _dispatcher: Dispatcher | None = field(init=False, default=None)
    _replay: JournalReplay | None = field(init=False, default=None)
    _journalling: asyncio.Future[None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Choose how the engine is asked."""
        maker = SampleMaker(decode=self.decode, seed=self.seed)
        if isinstance(self.engine, ServedEngine):
            # Of its own: evaluation counts its failures apart.
            scoring = Scoring(self.scoring.pool, self.scoring.on_error)
            self._dispatcher = Dispatcher(
                self.engine, self.config, lambda: scoring.num_waiting + self.scoring.num_waiting
            )
            self._served = ServedSource(
                self._dispatcher, maker, scoring, self.config, self.sampling, self.recipe, self.progress
            )
        else:
            self._waves = WaveSource(
                engine=self.engine,
                maker=maker,
                scoring=self.scoring,
                config=self.config,
                sampling=self.sampling,
                recipe=self.recipe,
                progress=self.progress,
            )

    @property
    def surplus(self) -> Sequence[RolloutGroup]:
        """Finished groups that the last batch had no room for, and the next one begins with."""
        if self._served is not None:
            return self._served.ready
        assert self._waves is not None
        return self._waves.surplus

    @property
    def queue_depths(self) -> dict[str, int]:
        """How much waits where, for people; nothing with an engine that decodes in waves."""
        if self._served is None or self._dispatcher is None:
            return {}
        return self._dispatcher.depths | self._served.depths

    @property
    def ledger(self) -> Ledger:
        """What becomes of every prompt; of served engines."""
        assert self._served is not None, "an engine that decodes in waves leaves nothing open"
        return self._served.ledger

    async def next_rollout(self, step: int, policy_version: int) -> Rollout:
        """A training batch; see `collect`. With a served engine it is on disk, in the recipe's journal, before."""
        assert self.recipe is not None, "batches are made by a recipe"
        if (entry := await self._from_journal(step, policy_version)) is not None:
            return await asyncio.to_thread(self._assemble, step, entry.groups, dict(entry.metrics))
        collected = await self.collect(step, policy_version)
        metrics = group_metrics(collected.groups) | collected.metrics
        if self._served is None:
            return self._assemble(step, collected.groups, metrics)
        if self.recipe.journal is not None:
            # Of the loop's clock too: other work goes on meanwhile.
            started = time.perf_counter()
            entry = JournalEntry(
                step=step,
                policy_version=policy_version,
                groups=collected.groups,
                metrics=metrics,
                stream_state=self.recipe.stream.state_dict(),
                num_drawn=collected.num_drawn,
                settled=collected.settled,
                open_prompts=collected.open_prompts,
            )
            write = asyncio.to_thread(write_journal, entry, journal_path(self.recipe.journal, step))
            self._journalling = asyncio.ensure_future(write)
            await asyncio.shield(self._journalling)
            metrics["perf/journal_s"] = time.perf_counter() - started
        return await asyncio.to_thread(self._assemble, step, collected.groups, metrics)

    async def _from_journal(self, step: int, policy_version: int) -> JournalEntry | None:
        if self._replay is None:
            return None
        entry = await asyncio.to_thread(self._replay.next, step, policy_version)
        self._end_replay()
        return entry

    def _end_replay(self) -> None:
        """Begin to generate where no batch of the journal is left."""
        if self._replay is not None and self._replay.is_over:
            assert self._served is not None, "others have no journal"
            self._served.restore(self._replay.end())
            self._replay, self._served.is_held = None, False
            self._served.look_again()

    def _assemble(self, step: int, groups: Sequence[RolloutGroup], metrics: dict[str, float]) -> Rollout:
        assert self.recipe is not None
        batch = build_train_batch(groups, self.recipe.algorithm, self.config.temperature)
        if self.config.replay_routing and self.recipe.routing is not None:
            batch = with_routing(batch, groups, routing_path(batch_path(self.recipe.routing, step)))
        return Rollout(batch=batch, metrics=metrics, records=sample_records(step, groups, self.recipe.num_records))

    async def collect(self, step: int, policy_version: int) -> CollectedGroups:
        """Generate, score and filter until the batch is full.

        Args:
            step: Number of the step; with an engine that decodes in waves, part of every sample's seed.
            policy_version: The trainer's current version.

        Raises:
            EndOfPrompts: They have been drawn `data.epochs` times.
            NoSignalError: Dynamic sampling found no group with differing rewards in all its rounds.
            RunError: Too many groups were too old or had no rewards, or see `generate_groups`.
        """
        source = self._served or self._waves
        assert source is not None
        collected = await source.collect(step, policy_version)
        if self.config.policy_lag or self.config.carry_over_max_lag:
            collected.metrics.update(staleness_metrics(collected.groups, policy_version))
        return collected

    async def generate_groups(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed_scope: str,
        sampling: SamplingParameters,
        first_place: int = 0,
    ) -> list[RolloutGroup]:
        """Generate and score a group for every prompt; responses without a reward are not in it.

        With a served engine all of a response is of the current version of the weights. Training's requests wait until
        these are sent.

        Args:
            prompts: The prompts; one may occur several times.
            group_size: Samples of each.
            seed_scope: Part of every sample's seed, beside the run's seed, the prompt and the sample's index.
            sampling: How tokens are drawn.
            first_place: Place of the first prompt among all of the scope, where they are generated in several parts;
                a prompt's draws depend on its place there.

        Raises:
            NonFiniteError: The model gave a response without a probability.
            RewardError: A response could not be scored, and `reward.on_error` is "fatal".
        """
        if self._served is not None:
            return await self._served.generate(prompts, group_size, seed_scope, sampling, first_place, self.scoring)
        assert self._waves is not None
        return await self._waves.generate(prompts, group_size, seed_scope, sampling, first_place)

    def state(self) -> ControllerState:
        """Where it stands between two batches: what `restore` needs to go on from here."""
        if self._replay is not None:
            return self._replay.state
        source = self._served or self._waves
        assert source is not None
        return source.state()

    async def save(self, path: Path) -> None:
        """Write down where it stands; generation goes on meanwhile.

        Raises:
            CheckpointError: The file cannot be written, or a batch that was given up could not be journalled.
        """
        await asyncio.to_thread(write_controller_state, await self.settled_state(), path)

    async def settled_state(self) -> ControllerState:
        """Where it stands, once a batch that was being journalled is on disk.

        Raises:
            CheckpointError: That failed.
        """
        if self._journalling is not None:
            # A batch that was being handed over when it was given up: its groups are in the journal, or nowhere.
            await asyncio.wait([self._journalling])
            if (problem := self._journalling.exception()) is not None:
                raise CheckpointError(f"the groups of the batch before are nowhere: {problem}")
        return self.state()

    def restore(self, step: int, path: Path | None, anew: bool = False, without_journal: bool = False) -> None:
        """Go on where another controller stood, before anything is asked of this one.

        Batches of later steps that a served engine had journalled are used before new ones are generated.

        Args:
            step: Steps that were finished then.
            path: What `save` wrote then; None where nothing was done.
            anew: Whether what had been generated then is of no use, because the configuration is another.
            without_journal: Whether the journal's later batches are of no use, for the same reason.

        Raises:
            CheckpointError: The file is damaged.
            ConfigError: The prompts are others, or in another order.
        """
        state = self.state() if path is None else read_controller_state(path)
        if anew:
            state = state.begun_anew()
        if without_journal and self.recipe is not None and self.recipe.journal is not None:
            forget_journal(self.recipe.journal, first=step + 1)
        if self._waves is not None:
            self._waves.restore(state)
            return
        assert self._served is not None and self.recipe is not None, "batches are made of training prompts"
        self.recipe.stream.load_state_dict(state.stream_state)
        if self.recipe.journal is None:
            self._served.restore(state)
            return
        self._replay = JournalReplay(self.recipe.journal, step, state, self.config.num_prompts_per_step)
        self._served.is_held = True
        self._end_replay()

    async def pause(self, mode: PauseMode) -> None:
        """Have a served engine stop where it is, so that its weights may change.

        What "abort" interrupts goes on after `resume`: from its tokens with `rollout.partial_rollouts`, else from the
        start.
        """
        assert self._served is not None and self._dispatcher is not None, "the engine has no servers"
        await self._dispatcher.pause(mode)
        self._served.look_again()

    async def resume(self, policy_version: int, failed: Collection[str]) -> None:
        """Go on with a served engine whose servers have taken in a version.

        Args:
            policy_version: The version.
            failed: Names of servers that did not take it in; they are restarted.

        Raises:
            RunError: No server is left.
        """
        assert self._served is not None and self._dispatcher is not None, "the engine has no servers"
        await self._dispatcher.resume(policy_version, failed)
        self._served.advance(policy_version)

    async def close(self) -> None:
        """Give up what a served engine has in flight, and wait until it has let go of it."""
        if self._served is not None and self._dispatcher is not None:
            await self._served.close()
            await self._dispatcher.close()
