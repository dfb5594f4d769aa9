"""Which finished groups a batch takes: dynamic sampling, the bound on staleness, and what is left over."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import RolloutGroup


class NoSignalError(RunError):
    """Every round of prompts gave groups whose rewards do not differ: there is nothing to learn from."""


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
        fresh = [group for group in groups if policy_version - _oldest_version(group) <= max_lag]
        self.num_stale += len(groups) - len(fresh)
        self.accepted += fresh[: self.missing]
        self.num_carried_in = len(self.accepted)
        self.surplus += fresh[self.num_carried_in :]

    def offer(self, group: RolloutGroup, policy_version: int) -> None:
        """Take or set aside a scored group, as seen from the trainer's current version."""
        if len(group.samples) < 2:
            self.num_incomplete += 1
        elif policy_version - _oldest_version(group) > self.policy_lag:
            self.num_stale += 1
        elif self.drop_zero_variance and not group.has_signal:
            self.without_signal.append(group)
        else:
            (self.accepted if self.missing else self.surplus).append(group)

    def fill_up(self) -> int:
        """Complete the batch with groups that were set aside; returns how many it took."""
        count = min(self.missing, len(self.without_signal))
        self.accepted += self.without_signal[:count]
        return count

    def counters(self) -> dict[str, int]:
        """What happened to the groups, as metrics; before `fill_up` or after it alike."""
        return {
            "rollout/groups_without_signal": len(self.without_signal),
            "rollout/groups_all_right": sum(_is_right(group) for group in self.without_signal),
            "rollout/groups_stale": self.num_stale,
            "rollout/groups_incomplete": self.num_incomplete,
            "rollout/groups_carried_in": self.num_carried_in,
            "rollout/groups_surplus": len(self.surplus),
        }


def _oldest_version(group: RolloutGroup) -> int:
    return min(sample.policy_version for sample in group.samples)


def _is_right(group: RolloutGroup) -> bool:
    return all(sample.is_correct for sample in group.samples)
