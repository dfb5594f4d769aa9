"""Groups from an engine that decodes in waves: nothing more is asked for until a wave's results are all in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.rollout.admission import Admission, no_signal_error, short_batch_error
from megatron_fipo.rollout.batch_recipe import BatchRecipe, CollectedGroups
from megatron_fipo.rollout.controller_state import ControllerState, OpenDraw
from megatron_fipo.rollout.engine import GenerationRequest, RolloutEngine, SamplingParameters
from megatron_fipo.rollout.samples import SampleMaker
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.types import Prompt, RolloutGroup


@dataclass(slots=True, kw_only=True)
class WaveSource:
    """A round of prompts, its results, and another round for the groups that are still missing.

    Attributes:
        engine: Generates.
        maker: Requests and samples.
        scoring: Rewards.
        config: Batch size and bounds.
        sampling: How tokens are drawn.
        recipe: Of training batches; None where `generate` alone is used.
        progress: Told of every response.
        surplus: Groups with a signal that the last batch had no room for; the next one begins with them, within
            `rollout.carry_over_max_lag`.
        returned: Prompts that are drawn again before the stream's.
    """

    engine: RolloutEngine
    maker: SampleMaker
    scoring: Scoring
    config: RolloutConfig
    sampling: SamplingParameters
    recipe: BatchRecipe | None
    progress: Progress
    surplus: list[RolloutGroup] = field(default_factory=list)
    returned: list[Prompt] = field(default_factory=list)

    async def collect(self, step: int, policy_version: int) -> CollectedGroups:
        """See `RolloutController.collect`; broken off, it leaves all as it was before."""
        before = self.state()
        try:
            return await self._collect(step, policy_version)
        except BaseException:
            self.restore(before)
            raise

    async def _collect(self, step: int, policy_version: int) -> CollectedGroups:
        assert self.recipe is not None, "batches are made of training prompts"
        stream, drop_zero_variance = self.recipe.stream, self.recipe.algorithm.drop_zero_variance_groups
        admission = Admission(self.config.num_prompts_per_step, drop_zero_variance, self.config.policy_lag)
        admission.carry_in(self.surplus, policy_version, self.config.carry_over_max_lag)
        num_generated, num_tokens, rounds = 0, 0, 0
        rewards: list[float] = []
        while admission.missing and rounds < self.config.max_generation_rounds:
            count = math.ceil(admission.missing * self.config.over_sampling)
            prompts = [*self.returned[:count], *stream.next(max(count - len(self.returned), 0))]
            self.returned = self.returned[count:]
            groups = await self.generate(prompts, self.config.group_size, f"{step}.{rounds}", self.sampling, 0)
            for group in groups:
                rewards += [sample.reward for sample in group.samples]
                num_tokens += sum(len(sample.response_token_ids) for sample in group.samples)
                admission.offer(group, policy_version)
            num_generated += len(groups)
            rounds += 1
        counters: dict[str, float] = {
            "rollout/generation_rounds": rounds,
            "rollout/groups_generated": num_generated,
            "rollout/response_tokens_generated": num_tokens,
            **admission.counters(),
            **self.scoring.counters(),
            "rollout/groups_filled_up": self._fill_up(step, admission, num_generated),
            "rollout/epoch": stream.epoch,
            **stream.counters(),
        }
        if rewards:
            counters["rollout/reward_mean_all"] = sum(rewards) / len(rewards)
        self.surplus = admission.surplus if self.config.carry_over_max_lag else []
        return CollectedGroups(groups=admission.accepted, metrics=counters)

    def state(self) -> ControllerState:
        """Where it stands between two batches."""
        assert self.recipe is not None, "batches are made of training prompts"
        surplus = [OpenDraw(place, group, True) for place, group in enumerate(self.surplus)]
        stream_state = self.recipe.stream.state_dict()
        return ControllerState(stream_state=stream_state, open_draws=surplus, returned=tuple(self.returned))

    def restore(self, state: ControllerState) -> None:
        """Go on where another one stood."""
        assert self.recipe is not None, "batches are made of training prompts"
        self.recipe.stream.load_state_dict(state.stream_state)
        self.surplus = [draw.group for draw in state.open_draws if draw.is_finished]
        self.returned = [*state.returned, *(draw.group.prompt for draw in state.open_draws if not draw.is_finished)]

    def _fill_up(self, step: int, admission: Admission, num_generated: int) -> int:
        """Complete the batch after the last round; returns how many groups it took from those without a signal."""
        if admission.without_signal and not admission.accepted:
            raise no_signal_error(step, self.config, num_generated, admission.without_signal)
        num_filled = admission.fill_up()
        if admission.missing:
            raise short_batch_error(
                step, self.config, admission.missing, num_generated, admission.num_stale, admission.num_incomplete
            )
        return num_filled

    async def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed_scope: str,
        sampling: SamplingParameters,
        first_place: int,
    ) -> list[RolloutGroup]:
        """See `RolloutController.generate_groups`."""
        requests: dict[str, tuple[int, GenerationRequest]] = {}
        for place, prompt in enumerate(prompts):
            scope = (seed_scope, first_place + place)
            for request in self.maker.requests(prompt, place, group_size, scope, sampling):
                requests[request.request_id] = (place, request)
        total = len(requests)
        self.progress.advance(0, total)
        await self.engine.submit([request for _, request in requests.values()])
        groups = [RolloutGroup(prompt=prompt, samples=[]) for prompt in prompts]
        async for result in self.engine.stream():
            if result.request_id not in requests:
                raise RuntimeError(f"the engine gave a result for {result.request_id}, which was not asked for")
            place, request = requests.pop(result.request_id)
            sample = self.maker.read(prompts[place], request, result)
            groups[place].samples.append(sample)
            self.scoring.hand_in(groups[place], sample)
            self.progress.advance(total - len(requests), total)
        if requests:
            raise RuntimeError(f"the engine lost {len(requests)} requests, {next(iter(requests))} first")
        async for group, sample in self.scoring.collect():
            self.progress.show_response(group.prompt.text, sample.response_text, sample.reward)
        for group in groups:
            group.samples.sort(key=lambda sample: sample.sample_index)
        return groups
