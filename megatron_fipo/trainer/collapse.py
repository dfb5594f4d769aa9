"""Whether reward or response length has collapsed, seen over many steps."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_fipo.config.safeguards import SafeguardsConfig
from megatron_fipo.types import TrainBatch


class CollapseWatch:
    """Looks at every rollout on the rank that has it.

    Args:
        config: What counts as a collapse.
    """

    def __init__(self, config: SafeguardsConfig) -> None:
        self.config = config
        self._rewards, self._lengths, self._truncated = (
            deque[float](maxlen=config.collapse_window_steps) for _ in range(3)
        )
        self._best_reward: float | None = None
        self._longest: float | None = None
        self._steps_without_signal = 0
        self._told: set[str] = set()

    def see(self, batch: TrainBatch, truncated_fraction: float | None) -> list[str]:
        """Take in a step's batch.

        Args:
            batch: Its batch.
            truncated_fraction: Part of its responses that the token limit cut off, where that is known.

        Returns:
            What has gone wrong since it was told last; each collapse is told again after it has passed.
        """
        self._steps_without_signal = 0 if batch.advantages.any() else self._steps_without_signal + 1
        self._rewards.append(float(batch.rewards.mean()))
        self._lengths.append(float((batch.sequence_lengths - batch.prompt_lengths).mean()))
        if truncated_fraction is not None:
            self._truncated.append(truncated_fraction)
        if (reward := self._mean(self._rewards)) is not None:
            self._best_reward = reward if self._best_reward is None else max(self._best_reward, reward)
        if (length := self._mean(self._lengths)) is not None:
            self._longest = length if self._longest is None else max(self._longest, length)
        found = dict(self._collapses())
        new = [text for kind, text in found.items() if kind not in self._told]
        self._told = set(found)
        return new

    def metrics(self) -> dict[str, float]:
        """Where the run stands; what the window is still too short for is left out."""
        metrics: dict[str, float] = {"rollout/steps_without_signal": self._steps_without_signal}
        if (drop := self._reward_drop) is not None:
            metrics["rollout/reward_drop"] = drop
        if (fraction := self._length_fraction) is not None:
            metrics["rollout/length_fraction"] = fraction
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain values that `load_state_dict` takes."""
        return {
            "rewards": list(self._rewards),
            "lengths": list(self._lengths),
            "truncated": list(self._truncated),
            "best_reward": self._best_reward,
            "longest": self._longest,
            "steps_without_signal": self._steps_without_signal,
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another watch's state; a window that has become shorter keeps the newest steps."""
        for name, values in (("rewards", self._rewards), ("lengths", self._lengths), ("truncated", self._truncated)):
            values.clear()
            values.extend(state[name])
        self._best_reward, self._longest = state["best_reward"], state["longest"]
        self._steps_without_signal, self._told = state["steps_without_signal"], set(state["told"])

    def _mean(self, window: deque[float]) -> float | None:
        """Mean of a full window."""
        return sum(window) / len(window) if window and len(window) == window.maxlen else None

    @property
    def _reward_drop(self) -> float | None:
        reward = self._mean(self._rewards)
        return None if reward is None or self._best_reward is None else self._best_reward - reward

    @property
    def _length_fraction(self) -> float | None:
        length = self._mean(self._lengths)
        return None if length is None or not self._longest else length / self._longest

    def _collapses(self) -> Iterator[tuple[str, str]]:
        """Kind and text of every limit that is passed now."""
        config, steps = self.config, self.config.collapse_window_steps
        drop, fraction, truncated = self._reward_drop, self._length_fraction, self._mean(self._truncated)
        if drop is not None and drop > config.max_reward_drop:
            yield (
                "reward",
                f"the mean reward of {steps} steps, {self._mean(self._rewards):.3f}, lies {drop:.3f} below the best of "
                f"the run, {self._best_reward:.3f} (safeguards.max_reward_drop = {config.max_reward_drop:g})",
            )
        if fraction is not None and fraction < config.min_length_fraction:
            yield (
                "length",
                f"the mean response length of {steps} steps has fallen to {fraction:.3f} of the longest of the run, "
                f"{self._longest:.1f} tokens (safeguards.min_length_fraction = {config.min_length_fraction:g})",
            )
        if truncated is not None and truncated > config.max_truncated_fraction:
            yield (
                "truncated",
                f"the token limit has cut off {truncated:.3f} of the responses of {steps} steps "
                f"(safeguards.max_truncated_fraction = {config.max_truncated_fraction:g})",
            )
        if self._steps_without_signal > config.max_steps_without_signal:
            yield (
                "signal",
                f"for {self._steps_without_signal} steps every group has had equal rewards "
                f"(safeguards.max_steps_without_signal = {config.max_steps_without_signal})",
            )
