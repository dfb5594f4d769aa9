"""Groups from served engines: always enough of them on their way, also while the trainer trains.

A batch may use groups whose oldest sample was begun by weights at most `policy_lag` versions behind those it trains. So
while a batch is awaited, groups for it and for the next `policy_lag` batches are on their way or ready, and for those
alone while none is; `over_sampling` times as many on their way, for what may be refused. The oldest groups go first.

When a batch is full, unfinished groups that would be too old for the next one are given up: the long tail is cut. Only
`over_sampling` leaves something to cut: without it a batch waits for them.
"""

import asyncio
import contextlib
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.data.stream import EndOfPrompts, PromptStream
from megatron_fipo.rollout.admission import (
    judge,
    no_signal_error,
    short_batch_error,
    signal_counters,
)
from megatron_fipo.rollout.batch_recipe import BatchRecipe, CollectedGroups
from megatron_fipo.rollout.controller_state import ControllerState, OpenDraw
from megatron_fipo.rollout.dispatch import Dispatcher
from megatron_fipo.rollout.draws import Draw, FinishedDraw, Period, as_it_is, as_result, as_sample, is_scored
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParameters
from megatron_fipo.rollout.ledger import Fate, Ledger, OpenPrompt
from megatron_fipo.rollout.samples import SampleMaker
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.rollout.service_time import ServiceTime
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.types import Prompt, RolloutGroup


class ServedSource:
    """Draws prompts and keeps a served engine busy with their groups.

    Args:
        dispatcher: Has requests answered.
        maker: Requests and samples.
        scoring: Rewards; of training's groups alone.
        config: Batch size and bounds.
        sampling: How training's tokens are drawn.
        recipe: Of training batches; None where `generate` alone is used.
        progress: Told of responses.

    Attributes:
        ledger: What becomes of every draw.
        is_held: Whether no prompt may be drawn, because batches of the journal come first.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        maker: SampleMaker,
        scoring: Scoring,
        config: RolloutConfig,
        sampling: SamplingParameters,
        recipe: BatchRecipe | None,
        progress: Progress,
    ) -> None:
        self.ledger = Ledger()
        self.is_held = False
        self._dispatcher, self._maker, self._scoring = dispatcher, maker, scoring
        self._config, self._sampling, self._recipe, self._progress = config, sampling, recipe, progress
        self._time = ServiceTime()
        self._under_way: dict[int, Draw] = {}
        self._to_go_on: dict[int, Draw] = {}
        self._ready: list[FinishedDraw] = []
        self._returned: deque[Prompt] = deque()
        self._period = self._next_period()
        self._awaited = False
        self._failure: BaseException | None = None
        self._end: EndOfPrompts | None = None
        self._changed = asyncio.Event()
        self._num_evaluations = 0

    @property
    def ready(self) -> list[RolloutGroup]:
        """Finished groups that wait for a batch, oldest first."""
        return [finished.group for finished in self._ready]

    @property
    def depths(self) -> dict[str, int]:
        """How many groups there are, for people."""
        return {"groups under way": len(self._under_way), "groups ready": len(self._ready)}

    async def collect(self, step: int, policy_version: int) -> CollectedGroups:
        """See `RolloutController.collect`."""
        self.advance(policy_version)
        self._awaited = True
        self._time.await_batch()
        self._tell_progress(begin=True)
        if self._config.policy_lag == 0 and not self._period.num_generated:
            self._period.first_round = self._round_of(self._config.num_prompts_per_step - len(self._ready))
        try:
            while not self._is_full(policy_version):
                self._changed.clear()
                self._top_up()
                if self._is_exhausted():
                    break
                if self._failure is not None:
                    raise self._failure
                if self._end is not None and not self._under_way:
                    raise self._end
                await self._changed.wait()
            return self._hand_over(step, policy_version)
        finally:
            self._awaited = False

    def advance(self, policy_version: int) -> None:
        """The trainer has come to a version: refuse what is too old for it, and go on."""
        for finished in list(self._ready):
            if policy_version - finished.version > self._carried_lag:
                self._ready.remove(finished)
                self.ledger.settle(finished.number, "stale")
        for draw in self._unfinished():
            if draw.version is not None and policy_version - draw.version > self._config.policy_lag:
                self._give_up(draw, "stale")
        if self._dispatcher.policy_version is None:
            self._dispatcher.policy_version = policy_version
        self.look_again()

    def look_again(self) -> None:
        """Draw what may be drawn, and see whether the batch is full; after anything that may have changed it."""
        self._top_up()
        self._changed.set()

    async def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed_scope: str,
        sampling: SamplingParameters,
        first_place: int,
        scoring: Scoring,
    ) -> list[RolloutGroup]:
        """Groups of prompts beside training; see `RolloutController.generate_groups`."""
        self._num_evaluations += 1
        groups = [RolloutGroup(prompt=prompt, samples=[]) for prompt in prompts]
        total, done = len(prompts) * group_size, 0
        self._progress.advance(0, total)

        async def one(place: int, request: GenerationRequest) -> None:
            nonlocal done
            result = await self._dispatcher.generate(request, (place, request.sample_index), is_evaluation=True)
            done += 1
            self._progress.advance(done, total)
            sample = await asyncio.to_thread(self._maker.read, prompts[place], request, result)
            groups[place].samples.append(sample)
            if await scoring.score(groups[place], sample):
                self._progress.show_response(prompts[place].text, sample.response_text, sample.reward)

        name = f"evaluation {self._num_evaluations}"
        with _first_error():
            async with asyncio.TaskGroup() as tasks:
                for place, prompt in enumerate(prompts):
                    scope = (seed_scope, first_place + place)
                    for request in self._maker.requests(prompt, f"{name}:{place}", group_size, scope, sampling):
                        tasks.create_task(one(place, request))
        for group in groups:
            group.samples.sort(key=lambda sample: sample.sample_index)
        return groups

    async def close(self) -> None:
        """Give up what is under way; whoever awaits a batch gets an error."""
        self._failure = self._failure or RunError("the rollout controller was closed")
        self._changed.set()
        tasks = [draw.task for draw in self._under_way.values() if draw.task is not None]
        for draw in self._unfinished():
            self._give_up(draw, "returned")
        for finished in [*self._ready, *self._period.without_signal]:
            self.ledger.settle(finished.number, "returned")
        self._ready, self._period.without_signal = [], []
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _carried_lag(self) -> int:
        """Versions that a finished group may be behind."""
        return max(self._config.policy_lag, self._config.carry_over_max_lag)

    def _round_of(self, missing: int) -> int:
        return math.ceil(max(missing, 0) * self._config.over_sampling)

    def _next_period(self) -> Period:
        return Period(self.ledger.num_drawn, self._round_of(self._config.num_prompts_per_step))

    @property
    def _budget(self) -> int:
        """Groups that may be generated for the next batch, with those that are for later ones."""
        first, later = self._period.first_round, self._config.num_prompts_per_step * self._config.policy_lag
        return self._config.max_generation_rounds * first + self._round_of(later)

    def _is_exhausted(self) -> bool:
        return not self._unfinished() and self._period.num_generated >= self._budget

    def _is_full(self, policy_version: int) -> bool:
        """Whether the batch can be taken: there are enough groups, and no more is cut than over-sampling has added."""
        config = self._config
        if len(self._ready) < config.num_prompts_per_step:
            return False
        spare = math.ceil(config.num_prompts_per_step * (config.over_sampling - 1))
        at_last_chance = sum(self._is_at_last_chance(finished.version, policy_version) for finished in self._ready)
        in_the_tail = sum(
            draw.version is not None and self._is_at_last_chance(draw.version, policy_version)
            for draw in self._unfinished()
        )
        return in_the_tail <= spare or at_last_chance >= config.num_prompts_per_step

    def _is_at_last_chance(self, version: int, policy_version: int) -> bool:
        """Whether a group is too old for the batch after this one."""
        return version + self._config.policy_lag <= policy_version

    def _top_up(self) -> None:
        """Draw as many prompts as may be on their way."""
        knows_version = not self._dispatcher.paused and self._dispatcher.policy_version is not None
        if self._recipe is not None and knows_version and not self.is_held:
            self._draw(self._recipe.stream)
        self._time.serve(bool(self._under_way) and not self._dispatcher.paused)

    def _draw(self, stream: PromptStream) -> None:
        config = self._config
        wanted = config.num_prompts_per_step * (config.policy_lag + self._awaited) - len(self._ready)
        while self._failure is None and len(self._under_way) < self._round_of(wanted):
            try:
                draw = self._next_draw(stream)
            except EndOfPrompts as end:
                self._end = end
                break
            if draw is None:
                break
            self._under_way[draw.number] = draw
            draw.task = asyncio.create_task(self._run(draw))

    def _next_draw(self, stream: PromptStream) -> Draw | None:
        if self._to_go_on:
            return self._to_go_on.pop(min(self._to_go_on))
        if len(self._under_way) >= self._budget - self._period.num_generated:
            return None
        prompt = self._returned.popleft() if self._returned else stream.next(1)[0]
        return Draw(self.ledger.draw(prompt), prompt)

    def _unfinished(self) -> list[Draw]:
        return [*self._under_way.values(), *self._to_go_on.values()]

    async def _run(self, draw: Draw) -> None:
        """Generate and score a group, and say what becomes of it."""
        try:
            with _first_error():
                group = await self._generate_group(draw)
        except Exception as error:
            self._failure = self._failure or error
            self._changed.set()
            return
        del self._under_way[draw.number]
        self._take_in(FinishedDraw(draw.number, group))
        self.look_again()

    async def _generate_group(self, draw: Draw) -> RolloutGroup:
        async with asyncio.TaskGroup() as tasks:
            for request in self._requests(draw):
                tasks.create_task(self._generate_sample(draw, request))
        draw.group.samples.sort(key=lambda sample: sample.sample_index)
        return draw.group

    def _requests(self, draw: Draw) -> list[GenerationRequest]:
        return self._maker.requests(
            draw.prompt,
            draw.number,
            self._config.group_size,
            ("draw", draw.number),
            self._sampling,
            with_routing=self._config.replay_routing,
        )

    async def _generate_sample(self, draw: Draw, request: GenerationRequest) -> None:
        group, index = draw.group, request.sample_index
        kept = draw.kept.get(index)
        if kept is not None and is_scored(kept):
            group.samples.append(kept)
            return

        def begins(version: int) -> None:
            draw.begun[index] = version

        begun = None if kept is None else as_result(request.request_id, kept)
        result = await self._dispatcher.generate(request, (draw.number, index), begins, begun=begun)
        draw.begun[index] = result.policy_version
        # Tokenizers leave other threads room to go on.
        sample = await asyncio.to_thread(self._maker.read, draw.prompt, request, result)
        group.samples.append(sample)
        if await self._scoring.score(group, sample):
            self._progress.show_response(draw.prompt.text, sample.response_text, sample.reward)
        self._dispatcher.poke()

    def _take_in(self, finished: FinishedDraw) -> None:
        group, period = finished.group, self._period
        period.num_generated += 1
        period.num_tokens += sum(len(sample.response_token_ids) for sample in group.samples)
        period.rewards += [sample.reward for sample in group.samples]
        self._sort_in(finished)
        self._tell_progress()

    def _sort_in(self, finished: FinishedDraw) -> None:
        assert self._recipe is not None
        group, period = finished.group, self._period
        lag = (self._dispatcher.policy_version or 0) - finished.version if group.samples else 0
        match judge(group, self._recipe.algorithm.drop_zero_variance_groups, lag, self._config.policy_lag):
            case "good":
                self._ready.append(finished)
                self._ready.sort(key=lambda each: each.number)
            case "no_signal":
                period.without_signal.append(finished)
                period.without_signal.sort(key=lambda each: each.number)
            case fate:
                self.ledger.settle(finished.number, fate)

    def _tell_progress(self, begin: bool = False) -> None:
        wanted, size = self._config.num_prompts_per_step, self._config.group_size
        if begin:
            self._progress.advance(0, wanted * size)
        if self._awaited:
            self._progress.advance(min(len(self._ready), wanted) * size, wanted * size)

    def _give_up(self, draw: Draw, fate: Fate) -> None:
        self._under_way.pop(draw.number, None)
        self._to_go_on.pop(draw.number, None)
        self.ledger.settle(draw.number, fate)
        if draw.task is not None:
            draw.task.cancel()

    def _hand_over(self, step: int, policy_version: int) -> CollectedGroups:
        """Take the oldest groups, refuse what no later batch can use, and begin the next period."""
        assert self._recipe is not None
        stream, period, wanted = self._recipe.stream, self._period, self._config.num_prompts_per_step
        used, surplus = self._ready[:wanted], self._ready[wanted:]
        filled = self._fill_up(step, len(used))
        used += filled
        self._end_period(used, surplus, policy_version)
        settled = self.ledger.drain()
        fates = Counter(each.fate for each in settled)
        metrics: dict[str, float] = {
            "rollout/generation_rounds": math.ceil(period.num_generated / max(period.first_round, 1)),
            "rollout/groups_generated": period.num_generated,
            "rollout/response_tokens_generated": period.num_tokens,
            **signal_counters([finished.group for finished in period.without_signal]),
            "rollout/groups_stale": fates["stale"],
            "rollout/groups_incomplete": fates["incomplete"],
            "rollout/groups_cut": fates["cut"],
            "rollout/groups_returned": fates["returned"],
            "rollout/groups_carried_in": sum(finished.number < period.first_number for finished in used),
            "rollout/groups_surplus": len(surplus),
            "rollout/groups_filled_up": len(filled),
            "rollout/groups_under_way": len(self._under_way),
            **self._scoring.counters(),
            **self._dispatcher.counters(),
            "rollout/epoch": stream.epoch,
            **stream.counters(),
            **self._time.metrics(),
        }
        if period.rewards:
            metrics["rollout/reward_mean_all"] = sum(period.rewards) / len(period.rewards)
        return CollectedGroups(
            groups=[finished.group for finished in used],
            metrics=metrics,
            num_drawn=self.ledger.num_drawn,
            settled=settled,
            open_prompts=self._open_prompts(),
        )

    def _fill_up(self, step: int, num_used: int) -> list[FinishedDraw]:
        """Groups without a signal that complete the batch after the last round."""
        config, period = self._config, self._period
        missing = config.num_prompts_per_step - num_used
        if not missing:
            return []
        without_signal = period.without_signal
        if without_signal and not num_used:
            groups = [finished.group for finished in without_signal]
            raise no_signal_error(step, config, period.num_generated, groups)
        filled = without_signal[:missing]
        if len(filled) < missing:
            fates = Counter(each.fate for each in self.ledger.settled)
            raise short_batch_error(
                step, config, missing - len(filled), period.num_generated, fates["stale"], fates["incomplete"]
            )
        return filled

    def _end_period(self, used: Sequence[FinishedDraw], surplus: Sequence[FinishedDraw], policy_version: int) -> None:
        for finished in used:
            self.ledger.settle(finished.number, "used")
        for finished in self._period.without_signal:
            if finished.number in self.ledger.open:
                self.ledger.settle(finished.number, "no_signal")
        self._ready = list(surplus) if self._carried_lag else []
        if not self._carried_lag:
            for finished in surplus:
                self.ledger.settle(finished.number, "surplus")
        for draw in self._unfinished():
            if draw.version is None and self._config.policy_lag == 0:
                self._give_up(draw, "returned")
                self._returned.append(draw.prompt)
            elif draw.version is not None and self._is_at_last_chance(draw.version, policy_version):
                self._give_up(draw, "cut")
        self._period, self._awaited = self._next_period(), False
        self._top_up()

    def state(self) -> ControllerState:
        """Where it stands; what is generated from here on is not in it."""
        assert self._recipe is not None, "batches are made of training prompts"
        finished = [*self._ready, *self._period.without_signal]
        draws = [OpenDraw(each.number, as_it_is(each.group), True) for each in finished]
        draws += [OpenDraw(draw.number, self._so_far(draw), False) for draw in self._unfinished()]
        return ControllerState(
            stream_state=self._recipe.stream.state_dict(),
            num_drawn=self.ledger.num_drawn,
            settled=list(self.ledger.settled),
            open_draws=sorted(draws, key=lambda draw: draw.number),
            returned=list(self._returned),
            period=self._period.counts(),
        )

    def _so_far(self, draw: Draw) -> RolloutGroup:
        """What there is of a group that is not finished."""
        group = as_it_is(draw.group)
        there = {sample.sample_index for sample in group.samples}
        for request in self._requests(draw):
            index = request.sample_index
            if index in there:
                continue
            result, kept = self._dispatcher.so_far(request.request_id), draw.kept.get(index)
            if result is not None:
                group.samples.append(as_sample(draw.prompt, index, result))
            elif kept is not None:
                group.samples.append(kept)
        return group

    def restore(self, state: ControllerState) -> None:
        """Go on where another one stood, before anything is drawn here."""
        assert self._recipe is not None and not self.ledger.num_drawn, "it has begun"
        self._recipe.stream.load_state_dict(state.stream_state)
        prompts = {draw.number: draw.group.prompt for draw in state.open_draws}
        self.ledger = Ledger(open=prompts, num_drawn=state.num_drawn, settled=list(state.settled))
        self._period = self._next_period() if state.period is None else Period(**state.period)
        for draw in state.open_draws:
            if draw.is_finished:
                self._sort_in(FinishedDraw(draw.number, draw.group))
            else:
                self._to_go_on[draw.number] = Draw.of_kept(draw.number, draw.group)
        self._returned = deque(state.returned)

    def _open_prompts(self) -> list[OpenPrompt]:
        ready = {finished.number for finished in self._ready}
        drawn = [OpenPrompt(number, prompt, number in ready) for number, prompt in self.ledger.open.items()]
        return [*drawn, *(OpenPrompt(None, prompt, False) for prompt in self._returned)]


@contextlib.contextmanager
def _first_error() -> Iterator[None]:
    """Of several errors raise the first alone."""
    try:
        yield
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
