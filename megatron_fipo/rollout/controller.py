"""The rollout controller: from prompts to full batches of scored groups.

It owns the prompt stream, the requests in flight, rewards, dynamic sampling and the staleness bound, and speaks to any
engine through `RolloutEngine`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.data.stream import PromptStream
from megatron_fipo.metrics.rollout_metrics import group_metrics
from megatron_fipo.rollout.admission import Admission, NoSignalError
from megatron_fipo.rollout.batch import build_train_batch
from megatron_fipo.rollout.engine import (
    GenerationRequest,
    GenerationResult,
    RolloutEngine,
    SamplingParameters,
)
from megatron_fipo.rollout.sample_records import sample_records
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.runtime.errors import NonFiniteError, RunError
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.types import Prompt, RolloutGroup, Sample, TrainBatch

# Token ids of a response to its text, the stop token left out.
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecipe:
    """What training batches are made of, and into what.

    Attributes:
        stream: The training prompts.
        algorithm: Says whether groups without a signal are set aside, how advantages are taken, and how many updates
            share a batch.
        num_records: Samples of a batch that are kept for people to read.
    """

    stream: PromptStream
    algorithm: AlgorithmConfig
    num_records: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedGroups:
    """A full batch of scored groups.

    Attributes:
        groups: As many as the step wants, in the order they were drawn.
        metrics: Counters of the rollout.
    """

    groups: list[RolloutGroup]
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class RolloutController:
    """Turns prompts into batches.

    Attributes:
        engine: Generates.
        scoring: Rewards.
        decode: Token ids to text.
        config: Batch size, sampling and bounds.
        sampling: How tokens are drawn.
        seed: Seed of all draws.
        recipe: Of training batches; None where `generate_groups` alone is used.
        surplus: Groups with a signal that the last batch had no room for; the next one begins with them, within
            `rollout.carry_over_max_lag`.
        progress: Told of every response.
    """

    engine: RolloutEngine
    scoring: Scoring
    decode: Decode
    config: RolloutConfig
    sampling: SamplingParameters
    seed: int
    recipe: BatchRecipe | None = None
    surplus: list[RolloutGroup] = field(default_factory=list)
    progress: Progress = NO_PROGRESS

    async def next_rollout(self, step: int, policy_version: int) -> Rollout:
        """A training batch; see `collect`."""
        assert self.recipe is not None, "batches are made by a recipe"
        collected = await self.collect(step, policy_version)
        return Rollout(
            batch=build_train_batch(collected.groups, self.recipe.algorithm, self.config.temperature),
            metrics=group_metrics(collected.groups) | collected.metrics,
            records=sample_records(step, collected.groups, self.recipe.num_records),
        )

    async def collect(self, step: int, policy_version: int) -> CollectedGroups:
        """Generate, score and filter until the batch is full.

        Args:
            step: Number of the step; part of every sample's seed.
            policy_version: The trainer's current version.

        Raises:
            EndOfPrompts: They have been drawn `data.epochs` times.
            NoSignalError: Dynamic sampling found no group with differing rewards in all its rounds.
            RunError: Too many groups were too old or had no rewards, or see `generate_groups`.
        """
        assert self.recipe is not None, "batches are made of training prompts"
        stream, drop_zero_variance = self.recipe.stream, self.recipe.algorithm.drop_zero_variance_groups
        admission = Admission(self.config.num_prompts_per_step, drop_zero_variance, self.config.policy_lag)
        admission.carry_in(self.surplus, policy_version, self.config.carry_over_max_lag)
        num_generated, num_tokens, rounds = 0, 0, 0
        rewards: list[float] = []
        while admission.missing and rounds < self.config.max_generation_rounds:
            count = math.ceil(admission.missing * self.config.over_sampling)
            prompts = stream.next(count)
            groups = await self.generate_groups(prompts, self.config.group_size, f"{step}.{rounds}", self.sampling)
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

    def _fill_up(self, step: int, admission: Admission, num_generated: int) -> int:
        """Complete the batch after the last round; returns how many groups it took from those without a signal."""
        if admission.without_signal and not admission.accepted:
            rewards = [sample.reward for group in admission.without_signal for sample in group.samples]
            group = admission.without_signal[-1]
            shown = f"{group.prompt.text[-80:]!r} was answered {group.samples[0].response_text[:80]!r}"
            raise NoSignalError(
                f"step {step}: rollout.max_generation_rounds = {self.config.max_generation_rounds}: none of "
                f"{num_generated} groups had differing rewards (mean reward {sum(rewards) / len(rewards):.3f}); the "
                f"task is too easy or too hard for this model, or the reward is broken ({shown}); mend that, or set "
                "algorithm.drop_zero_variance_groups to false"
            )
        num_filled = admission.fill_up()
        if admission.missing:
            raise RunError(
                f"step {step}: {admission.missing} of {admission.wanted} groups are missing after "
                f"{self.config.max_generation_rounds} rounds of {num_generated} groups: {admission.num_stale} were "
                f"older than rollout.policy_lag = {self.config.policy_lag} allows, {admission.num_incomplete} had "
                "fewer than two responses with a reward; allow a greater lag or more rounds, or mend the reward"
            )
        return num_filled

    async def generate_groups(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed_scope: str,
        sampling: SamplingParameters,
        first_place: int = 0,
    ) -> list[RolloutGroup]:
        """Generate and score a group for every prompt; responses without a reward are not in it.

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
        requests: dict[str, tuple[int, GenerationRequest]] = {}
        for place, prompt in enumerate(prompts):
            for index in range(group_size):
                request = GenerationRequest(
                    # The place keeps two draws of one prompt apart.
                    prompt_id=f"{place}:{prompt.id}",
                    sample_index=index,
                    prompt_token_ids=prompt.token_ids,
                    seed=derive_seed(self.seed, seed_scope, first_place + place, prompt.id, index),
                    sampling=sampling,
                )
                requests[request.request_id] = (place, request)
        total = len(requests)
        self.progress.advance(0, total)
        await self.engine.submit([request for _, request in requests.values()])
        groups = [RolloutGroup(prompt=prompt, samples=[]) for prompt in prompts]
        async for result in self.engine.stream():
            if result.request_id not in requests:
                raise RuntimeError(f"the engine gave a result for {result.request_id}, which was not asked for")
            place, request = requests.pop(result.request_id)
            sample = self._read(prompts[place], request, result)
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

    def _read(self, prompt: Prompt, request: GenerationRequest, result: GenerationResult) -> Sample:
        if not np.isfinite(result.log_probs).all():
            place = int(np.argmin(np.isfinite(result.log_probs)))
            raise NonFiniteError(
                f"prompt {prompt.id}, sample {request.sample_index}: the log-probability of response token {place} is "
                f"{result.log_probs[place]}; the engine's weights of policy version {result.policy_version} are "
                "broken: check the model's files, or lower optimizer.learning_rate"
            )
        ids = result.token_ids
        shown = ids[:-1] if result.finish_reason == "stop" else ids
        text = self.decode(shown.tolist())
        return Sample(
            prompt_id=prompt.id,
            sample_index=request.sample_index,
            response_token_ids=ids,
            rollout_log_probs=result.log_probs,
            finish_reason=result.finish_reason,
            policy_version=result.policy_version,
            response_text=text,
        )
