"""Which finished groups a batch takes: dynamic sampling, the bound on staleness, and what is left over."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import RolloutGroup

Verdict = Literal["good", "incomplete", "stale", "no_signal"]


class NoSignalError(RunError):
    """Every round of prompts gave groups whose rewards do not differ: there is nothing to learn from."""


def judge(group: RolloutGroup, drop_zero_variance: bool, lag: int, max_lag: int) -> Verdict:
    """Whether a batch can take a scored group.

    Args:
        group: The group.
        drop_zero_variance: Dynamic sampling: groups whose rewards are all equal are set aside.
        lag: Weight versions that it is behind.
        max_lag: Versions that it may be behind.
    """
    if len(group.samples) < 2:
        return "incomplete"
    if lag > max_lag:
        return "stale"
    return "no_signal" if drop_zero_variance and not group.has_signal else "good"


def oldest_version(group: RolloutGroup) -> int:
    """A group is as old as its oldest sample, and a sample as the weights that began it."""
    return min(sample.policy_version for sample in group.samples)


@dataclass(slots=True)
class Admission:
    """Fills one batch with groups.

    Attributes:
        wanted: Groups of a full batch.
        drop_zero_variance: Dynamic sampling: groups whose rewards are all equal are set aside.
        policy_lag: Weight versions that a group may be behind.
        accepted: Groups of the batch, in order of admission.
        surplus: Groups that would have been taken, had the batch not been full.
        without_signal: Groups set aside by dynamic sampling.
        num_stale: Groups refused for their age.
        num_incomplete: Groups refused because fewer than two of their samples have a reward.
        num_carried_in: Groups taken from an earlier batch's surplus.
    """

    wanted: int
    drop_zero_variance: bool
    policy_lag: int
    accepted: list[RolloutGroup] = field(default_factory=list)
    surplus: list[RolloutGroup] = field(default_factory=list)
    without_signal: list[RolloutGroup] = field(default_factory=list)
    num_stale: int = 0
    num_incomplete: int = 0
    num_carried_in: int = 0

    @property
    def missing(self) -> int:
        """Groups still needed."""
        return self.wanted - len(self.accepted)

    def carry_in(self, groups: Sequence[RolloutGroup], policy_version: int, max_lag: int) -> None:
        """Begin with an earlier batch's surplus, oldest first.

        Args:
            groups: The surplus.
            policy_version: The trainer's current version.
            max_lag: Weight versions that it may be behind.
        """
        fresh = [group for group in groups if policy_version - oldest_version(group) <= max_lag]
        self.num_stale += len(groups) - len(fresh)
        self.accepted += fresh[: self.missing]
        self.num_carried_in = len(self.accepted)
        self.surplus += fresh[self.num_carried_in :]

    def offer(self, group: RolloutGroup, policy_version: int) -> None:
        """Take or set aside a scored group, as seen from the trainer's current version."""
        lag = policy_version - oldest_version(group) if group.samples else 0
        match judge(group, self.drop_zero_variance, lag, self.policy_lag):
            case "incomplete":
                self.num_incomplete += 1
            case "stale":
                self.num_stale += 1
            case "no_signal":
                self.without_signal.append(group)
            case "good":
                (self.accepted if self.missing else self.surplus).append(group)

    def fill_up(self) -> int:
        """Complete the batch with groups that were set aside; returns how many it took."""
        count = min(self.missing, len(self.without_signal))
        self.accepted += self.without_signal[:count]
        return count

    def counters(self) -> dict[str, int]:
        """What happened to the groups, as metrics; before `fill_up` or after it alike."""
        return {
            **signal_counters(self.without_signal),
            "rollout/groups_stale": self.num_stale,
            "rollout/groups_incomplete": self.num_incomplete,
            "rollout/groups_carried_in": self.num_carried_in,
            "rollout/groups_surplus": len(self.surplus),
        }


def signal_counters(without_signal: Sequence[RolloutGroup]) -> dict[str, int]:
    """How many groups have no signal, and how many of them because all is right, as metrics."""
    all_right = [all(sample.is_correct for sample in group.samples) for group in without_signal]
    return {"rollout/groups_without_signal": len(all_right), "rollout/groups_all_right": sum(all_right)}


def no_signal_error(
    step: int, config: RolloutConfig, num_generated: int, without_signal: Sequence[RolloutGroup]
) -> NoSignalError:
    """Says that none of a step's groups can be learnt from; there is at least one."""
    rewards = [sample.reward for group in without_signal for sample in group.samples]
    group = without_signal[-1]
    shown = f"{group.prompt.text[-80:]!r} was answered {group.samples[0].response_text[:80]!r}"
    return NoSignalError(
        f"step {step}: rollout.max_generation_rounds = {config.max_generation_rounds}: none of "
        f"{num_generated} groups had differing rewards (mean reward {sum(rewards) / len(rewards):.3f}); the "
        f"task is too easy or too hard for this model, or the reward is broken ({shown}); mend that, or set "
        "algorithm.drop_zero_variance_groups to false"
    )


def short_batch_error(
    step: int, config: RolloutConfig, missing: int, num_generated: int, num_stale: int, num_incomplete: int
) -> RunError:
    """Says that a batch cannot be completed."""
    return RunError(
        f"step {step}: {missing} of {config.num_prompts_per_step} groups are missing after "
        f"{config.max_generation_rounds} rounds of {num_generated} groups: {num_stale} were "
        f"older than rollout.policy_lag = {config.policy_lag} allows, {num_incomplete} had "
        "fewer than two responses with a reward; allow a greater lag or more rounds, or mend the reward"
    )
